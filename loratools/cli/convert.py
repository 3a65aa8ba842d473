"""``loratools convert``: an adapter in another layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import options, output, resume_options

if TYPE_CHECKING:
    from loratools.ops.results import ConvertReport

_EPILOG = """\b
Examples:
  loratools convert style.safetensors -o style_diffusers.safetensors --to diffusers
  loratools convert pytorch_lora_weights.safetensors -o for_webui.safetensors --to kohya
  loratools convert lokr.safetensors -o lora.safetensors --to kohya --as lora --rank 32
  loratools convert flat.safetensors -o unflattened --to peft --base model_folder
  loratools convert peft_folder -o adapter.gguf --to gguf --base model_folder
  loratools convert peft_folder -o served --to vllm --rank-bucket --full-weights head.safetensors
  loratools convert peft_folder -o mlx_folder --to mlx --base model_folder
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
    help="The base checkpoint, whose names decide where no architecture's table does; --as needs it for OFT and DoRA. "
    "For GGUF and torchtune its config.json is enough.",
)
@click.option(
    "--initial",
    type=options.PATH,
    metavar="DIR",
    help="The factors before training of a PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA adapter, as PEFT saved them: makes a "
    "plain LoRA of twice the rank for the base as it was published.",
)
@click.option(
    "--heads",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many heads the model's queries have, where rows depend on it (GGUF, torchtune). Default: as config.json "
    "of --base says.",
)
@click.option(
    "--kv-heads",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many heads its keys have; likewise.",
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
    help="With --as: the rank, a count. Default: full, exact. With a program in --to: the rank of every module; higher "
    "ones are cut, at an error that is reported, lower ones padded with zeros. Default: the highest there is.",
)
@click.option(
    "--rank-bucket",
    "bucket",
    is_flag=True,
    help="With a program in --to: pad to the next rank that it provides for.",
)
@click.option(
    "--full-weights",
    type=options.PATH,
    metavar="FILE",
    help="With a program in --to: write whole tensors that it cannot load (modules_to_save, biases, rows of "
    "embeddings) into this .safetensors file, under the base's own names. Default: such an adapter is refused.",
)
@click.option(
    "--experts",
    type=click.Choice(["keep", "split", "fused"]),
    default="keep",
    help="How experts are written: a module for each (split), one for all of a layer (fused; PEFT's "
    "target_parameters). Default: as they are, unless the layout has but one way (MLX, GGUF).",
)
@click.option(
    "--experts-count",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many experts a layer has. Default: as names, ranks, and config.json of --base say.",
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
@resume_options.cleanable
@options.converting
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

    With a program in --to (vllm, sglang, lorax, llama.cpp, mlx) the adapter is brought into the form that it holds:
    ranks padded with zeros to one, scales folded into one, other kinds turned into LoRA, DoRA with --base at the rank
    that keeps 99.9 % of its energy, or at --rank.
    """
    _refuse_alone(layout, shared)
    from loratools.ops import convert

    with output.progress("converting", quiet=quiet) as progress:
        report = convert.convert_file(path, to=layout, progress=progress, **shared)
    _write(report, dry_run=shared["dry_run"], as_json=as_json, quiet=quiet)


def _refuse_alone(layout: str | None, shared: Mapping[str, Any]) -> None:
    """Refuse options that say nothing without another one."""
    from loratools.runtimes import runtimes

    found = runtimes().get(layout or "")
    program = found is not None and found.normal
    if shared["rank"] is not None and shared["as_kind"] is None and not program:
        raise click.UsageError(
            "--rank is the rank of what --as makes, or of a program's form (--to vllm). Add --as lora."
        )
    if not program and (shared["bucket"] or shared["full_weights"]):
        name = "--rank-bucket" if shared["bucket"] else "--full-weights"
        raise click.UsageError(
            f"{name} is for programs that serve adapters. Name one with --to: vllm, sglang, lorax."
        )


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
