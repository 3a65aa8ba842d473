"""``loratools bake``: adapters into a base checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import checkpoint_options, engine_options, options, output, resume_options

if TYPE_CHECKING:
    from loratools.ops.checkpoint_results import BakeReport

_EPILOG = """\b
Examples:
  loratools bake base.safetensors style.safetensors -o baked.safetensors
  loratools bake base.ckpt A.safetensors B.safetensors --weights 0.8,0.5 -o baked.ckpt
  loratools bake model_folder peft_folder -o baked_folder --dry-run
  loratools bake model_folder peft_folder -o baked_folder --resume
  loratools bake fp8.safetensors A.safetensors -o out.safetensors --rounding compensated
"""


@click.command("bake", epilog=_EPILOG)
@click.argument("base", metavar="BASE", type=options.PATH)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=options.PATH)
@checkpoint_options.strengths
@click.option("--precise", is_flag=True, help="Compute in float64 instead of float32.")
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic", "compensated"]),
    default="nearest",
    metavar="HOW",
    help="To the store dtype: nearest (default), stochastic, or compensated (to nearest, then corrected in the "
    "adapters' own subspace).",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of stochastic rounding.")
@resume_options.resuming
@options.baking
@options.arch
@engine_options.running
@options.common
def command(
    base: str,
    adapters: Sequence[str],
    weights: tuple[float, ...] | None,
    as_json: bool,
    quiet: bool,
    **shared: Any,
) -> None:
    """Write a checkpoint with adapters in it.

    BASE is a file, a sharded model (its folder or index), or a diffusers folder. OUT has the same container, dtype
    and files; what lies beside the weights is copied. Each weight becomes W + Σ w·ΔW, one at a time, so that memory
    is bounded by the largest of them.

    An adapter that BASE has no place for is refused; one that fits in part is, too, unless --skip-missing allows it.
    "Kept" is how much of ΔW is in the result once it is rounded to the store dtype: ⟨stored − W, ΔW⟩ / ‖ΔW‖².

    What a bake of more than a second has done is written down as it goes, so that --resume can go on after a crash.
    """
    checkpoint_options.one_weight_each(weights, adapters)
    from loratools.ops import bake

    with output.progress("baking", quiet=quiet, in_bytes=True) as progress:
        report = bake.bake(base, adapters, shared.pop("output"), weights=weights, progress=progress, **shared)
    _write(report, dry_run=shared["dry_run"], as_json=as_json, quiet=quiet)


def _write(report: BakeReport, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    written = None if dry_run else report.output
    if as_json:
        from loratools.report import checkpoint_data

        output.write_json(checkpoint_data.bake_json(report, dry_run=dry_run), written=written)
    elif not quiet:
        from loratools.report.bake_text import bake_text

        output.write_report(
            lambda width, symbols: bake_text(report, width=width, symbols=symbols, dry_run=dry_run),
            written=written,
        )
