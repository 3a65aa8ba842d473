"""``loratools pack``: a library of adapters as one folder for batched serving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from loratools import runtimes
from loratools.cli import engine_options, options, output, resume_options

_EPILOG = """\b
Examples:
  loratools pack adapters -o packed --for vllm
  loratools pack adapters more/style -o packed --ranks 8,16,32,64 --dtype bfloat16
  loratools pack adapters -o packed --for sglang --skip-unfit --json
  loratools pack adapters -o packed --resume
  loratools pack adapters -o compressed --shared-basis 64
"""
_NAMES = sorted(runtimes.runtimes())


def _ranks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Callback of --ranks."""
    try:
        found = tuple([int(each) for each in value.split(",")]) if value is not None else ()
    except ValueError:
        found = (0,)
    if any(rank < 1 for rank in found):
        raise click.BadParameter(f"{value!r} are no ranks. Give counts: 8,16,32,64.", ctx, param)
    return found


@click.command("pack", epilog=_EPILOG)
@click.argument("libraries", metavar="LIBRARY...", nargs=-1, required=True, type=options.PATH)
@click.option(
    "--for",
    "runtime",
    type=click.Choice(_NAMES),
    help="The program that is to serve them: what it would refuse or pass over does not fit.",
)
@click.option(
    "--max-rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --for: the limit of the rank that the program is started with. Default: its usual one.",
)
@click.option(
    "--ranks",
    callback=_ranks,
    metavar="N,N,…",
    help="Pad every adapter with zeros to the next of these ranks. Default: to the largest of its own.",
)
@click.option(
    "--base",
    type=options.PATH,
    metavar="BASE",
    help="The base model: whether it has the adapters' modules, in their shapes, and names that nothing else tells.",
)
@click.option(
    "--duplicate-error",
    type=click.FloatRange(min=0.0, max=1.0),
    metavar="F",
    help="The relative difference of ΔW up to which two adapters are one. Default: what rounding to their dtypes "
    "explains (float16: 0.002); 0 keeps all.",
)
@click.option(
    "--shared-basis",
    type=click.IntRange(min=1),
    metavar="R",
    help="Compress all into one basis of rank R for each module, and a small core for each adapter (arXiv 2407.00066).",
)
@click.option("--diagonal", is_flag=True, help="With --shared-basis: diagonal cores, R numbers each.")
@click.option("--skip-unfit", is_flag=True, help="Leave out what does not fit, and list it.")
@click.option(
    "--resume",
    is_flag=True,
    help="Keep what is finished where this run is interrupted, and go on behind what one that was has finished; "
    "inputs that have changed are done again.",
)
@resume_options.cleanable
@options.packing
@options.arch
@options.common
@engine_options.running_on_cpus
def command(
    libraries: Sequence[str],
    layout: str | None,
    as_json: bool,
    quiet: bool,
    **shared: Any,
) -> None:
    """A library of adapters of one base as one folder for batched serving.

    LIBRARY is an adapter, or a folder in which adapters lie at any depth. OUT gets one folder for each of them, in one
    layout, with its scale folded in and its ranks padded, and an index.json that says what each is. Of adapters that do
    the same under another spelling (layout, alpha folded or not, factors rotated) one is kept, and the others' names
    are noted as its own.

    What cannot be read, is no plain LoRA, or is of another base model is refused unless --skip-unfit leaves it out.
    """
    if shared["max_rank"] is not None and shared["runtime"] is None:
        raise click.UsageError("--max-rank is the limit of a program. Add --for.")
    if shared["diagonal"] and shared["shared_basis"] is None:
        raise click.UsageError("--diagonal is about a shared basis. Add --shared-basis R.")
    from loratools.ops.pack import pack

    goal, dry_run = shared.pop("output"), shared["dry_run"]
    with output.progress("packing", quiet=quiet) as progress:
        report = pack(libraries, goal, layout=layout, progress=progress, **shared)
    written = None if dry_run else report.output
    if as_json:
        from loratools.report.pack_data import pack_json

        output.write_json(pack_json(report, dry_run=dry_run), written=written)
    elif not quiet:
        from loratools.report.pack_text import pack_text

        output.write_report(
            lambda width, symbols: pack_text(report, width=width, symbols=symbols, dry_run=dry_run),
            written=written,
        )
