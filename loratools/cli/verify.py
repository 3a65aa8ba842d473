"""``loratools verify``: whether a bake happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import checkpoint_options, engine_options, options, output

if TYPE_CHECKING:
    from loratools.ops.checkpoint_results import VerifyReport

_EPILOG = """\b
Examples:
  loratools verify base.safetensors style.safetensors baked.safetensors
  loratools verify base.ckpt A.safetensors B.safetensors baked.ckpt --weights 0.8,0.5
  loratools verify model_folder peft_folder baked_folder --json
"""


@click.command("verify", epilog=_EPILOG)
@click.argument("base", metavar="BASE", type=options.PATH)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=options.PATH)
@click.argument("baked", metavar="BAKED", type=options.PATH)
@checkpoint_options.strengths
@options.arch
@options.common
@engine_options.running_on_cpus
def command(
    base: str,
    adapters: Sequence[str],
    baked: str,
    weights: tuple[float, ...] | None,
    as_json: bool,
    quiet: bool,
    **shared: Any,
) -> None:
    """Whether a checkpoint is BASE with adapters baked in, tensor by tensor.

    Each weight of BAKED is compared with W + Σ w·ΔW in float64, and all others with BASE's, bit for bit. "Kept" is
    how much of ΔW is in BAKED, ⟨Q − W, ΔW⟩ / ‖ΔW‖²; "error" is ‖Q − (W + ΔW)‖ / ‖ΔW‖, and "of rounding" what
    rounding to the store dtype alone makes of it.

    Exit status 1 if anything is not what it should be; the report says what.
    """
    checkpoint_options.one_weight_each(weights, adapters)
    from loratools.ops import verify

    with output.progress("verifying", quiet=quiet, in_bytes=True) as progress:
        report = verify.verify(base, adapters, baked, weights=weights, progress=progress, **shared)
    _write(report, as_json=as_json, quiet=quiet)
    if not report.ok:
        click.get_current_context().exit(1)


def _write(report: VerifyReport, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        from loratools.report import checkpoint_data

        output.write_json(checkpoint_data.verify_json(report))
    elif not quiet:
        from loratools.report.verify_text import verify_text

        output.write_report(lambda width, symbols: verify_text(report, width=width, symbols=symbols))
