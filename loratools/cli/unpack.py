"""``loratools unpack``: single adapters out of a pack."""

from __future__ import annotations

from collections.abc import Sequence

import click

from loratools.cli import options, output, resume_options

_EPILOG = """\b
Examples:
  loratools unpack packed -o adapters
  loratools unpack packed style character -o adapters
  loratools unpack compressed style -o adapters --json
"""


@click.command("unpack", epilog=_EPILOG)
@click.argument("path", metavar="PACK", type=options.PATH)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@resume_options.cleanable
@options.unpacking
@options.common
def command(
    path: str,
    names: Sequence[str],
    output_path: str,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Single adapters out of a pack, each in a folder of its name in OUT.

    Without NAME all of them, duplicates included, which come out as what was kept of them. They have the ranks that
    they had before they were padded, and ΔW bit for bit as it was packed; out of a shared basis they are LoRA of its
    rank.
    """
    from loratools.ops.unpack import unpack

    with output.progress("unpacking", quiet=quiet) as progress:
        report = unpack(
            path, output_path, names=names, overwrite=overwrite, dry_run=dry_run, progress=progress
        )
    written = None if dry_run else report.output
    if as_json:
        from loratools.report.pack_data import unpack_json

        output.write_json(unpack_json(report, dry_run=dry_run), written=written)
    elif not quiet:
        from loratools.report.pack_text import unpack_text

        output.write_report(
            lambda width, symbols: unpack_text(report, width=width, symbols=symbols, dry_run=dry_run),
            written=written,
        )
