"""--resume and --clean: what is done with the work of a run that was interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from loratools.cli import output
from loratools.cli.options import Decorated

_CLEANING = "loratools.cleaning"  # in the context, where the name of the output is still to be found


def resuming(command: Decorated) -> Decorated:
    """--resume and --clean, for a command that writes: a function with ``resume``.

    With --clean the function is not called, unless the command finds a name for its output by itself: it then asks
    ``cleaning`` first.
    """
    for option in (_clean, _resume):
        command = option(command)
    return command


def cleanable(command: Decorated) -> Decorated:
    """--clean alone, for a command that writes, and cannot be resumed or has a --resume of its own."""
    return _clean(command)


def cleaning(ctx: click.Context) -> bool:
    """Whether to :func:`clean` an output whose name was not given, instead of doing the work."""
    return bool(ctx.meta.get(_CLEANING))


def clean(path: str, *, as_json: bool, quiet: bool) -> None:
    """Remove what interrupted runs have left beside an output, and say what it was.

    Raises:
        LoraError: A run is still at work on it, or the system refuses.
    """
    from loratools.ops import leftovers
    from loratools.report import values

    found = leftovers.remove(path)
    if as_json:
        output.write_json({"removed": list(found.paths), "bytes": found.bytes})
    elif not quiet:
        for each in found.paths:
            output.write_text(f"Removed {values.clean(each)} ({found.bytes:,} bytes).")
        if not found.paths:
            output.write_text(f"Nothing is left of interrupted runs of {values.clean(path)}.")


class _Clean(click.Option):
    """A flag that ends the command where the output's name is known, before anything else is looked at."""

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        """Clean, if that is asked for; only the output has to be given as it should be."""
        found = super().handle_parse_result(ctx, opts, args)
        if not found[0] or ctx.resilient_parsing:
            return found
        other = [name for name in ("resume", "dry_run") if opts.get(name)]
        if other:
            raise click.UsageError(f"--clean and --{other[0].replace('_', '-')} exclude each other.", ctx)
        given = next(each for each in ctx.command.params if each.name in ("output", "output_path"))
        path = given.process_value(ctx, opts.get(given.name or ""))
        if not path and given.required:
            raise click.MissingParameter(ctx=ctx, param=given)
        if path:
            clean(path, as_json=bool(opts.get("as_json")), quiet=bool(opts.get("quiet")))
            ctx.exit()
        ctx.meta[_CLEANING] = True
        return found


_resume = click.option(
    "--resume",
    is_flag=True,
    help="Go on with a run of the same inputs and options that was interrupted, and keep what is done if this one is.",
)
_clean = click.option(
    "--clean",
    cls=_Clean,
    is_flag=True,
    is_eager=True,
    expose_value=False,
    help="Remove what interrupted runs have left beside OUT, and do nothing else.",
)
