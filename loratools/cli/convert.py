"""``loratools convert``: an adapter in another layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loratools.cli import options, output

if TYPE_CHECKING:
    from loratools.ops.results import ConvertReport

_EPILOG = """\b
Examples:
  loratools convert style.safetensors -o style_diffusers.safetensors --to diffusers
  loratools convert pytorch_lora_weights.safetensors -o for_webui.safetensors --to kohya
  loratools convert lokr.safetensors -o lora.safetensors --to kohya --as lora --rank 32
  loratools convert flat.safetensors -o peft_folder --to peft --base model_folder
  loratools convert IN -o OUT --to attn-procs --drop text_encoder --json
"""


def _droppable(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Callback of --drop: what nothing is called is wrong usage, whatever the file holds."""
    if value:
        from loratools.errors import OptionError
        from loratools.ops import _settle

        try:
            _settle.refuse_unknown(value)
        except OptionError as error:
            raise click.BadParameter(str(error), ctx, param) from None
    return value


@click.command("convert", epilog=_EPILOG)
@click.argument("path", metavar="IN", type=options.PATH)
@click.option(
    "--verify/--no-verify",
    "check",
    default=True,
    help="Compare ΔW·x of both files on random x. Default: yes.",
)
@click.option(
    "--base",
    type=options.PATH,
    metavar="PATH",
    help="The base checkpoint, whose names decide where no architecture's table does; --as needs it for OFT and DoRA.",
)
@click.option(
    "--as",
    "as_kind",
    type=click.Choice(["lora"]),
    metavar="KIND",
    help="Turn LoHa, LoKr and other kinds into this one first: lora.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --as: the rank, a count. Default: full, exact.",
)
@click.option(
    "--fold", is_flag=True, help="Fold alpha into the factors though the layout has a place for it."
)
@click.option(
    "--drop",
    callback=_droppable,
    multiple=True,
    metavar="KIND",
    help="Leave out what the layout cannot hold: extras, magnitude, bias, norm, unnamed, a kind (loha, full) or a "
    "component (text_encoder). May be repeated.",
)
@options.writing
@options.arch
@options.common
def command(
    path: str,
    layout: str | None,
    as_json: bool,
    quiet: bool,
    **shared: Any,
) -> None:
    """Write an adapter in another layout, losslessly.

    ΔW of every module stays as it is: names change, fused weights are split and split ones fused exactly, and alpha is
    kept, or folded into the factors where the layout has no place for it. Every tensor of the input is accounted
    for; what the layout cannot hold is refused, with its keys, unless --drop allows to leave it out.
    """
    if shared["rank"] is not None and shared["as_kind"] is None:
        raise click.UsageError("--rank is the rank of what --as makes. Add --as lora.")
    from loratools.ops import convert

    with output.progress("converting", quiet=quiet) as progress:
        report = convert.convert_file(path, to=layout, progress=progress, **shared)
    _write(report, dry_run=shared["dry_run"], as_json=as_json, quiet=quiet)


def _write(report: ConvertReport, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    written = None if dry_run else report.output
    if as_json:
        from loratools.report import data

        output.write_json(data.convert_json(report, dry_run=dry_run), written=written)
    elif not quiet:
        from loratools.report.convert_text import convert_text

        output.write_report(
            lambda width, symbols: convert_text(report, width=width, symbols=symbols, dry_run=dry_run),
            written=written,
        )
