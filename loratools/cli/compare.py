"""``loratools compare``: how adapters relate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import checkpoint_options, engine_options, options, output

if TYPE_CHECKING:
    from loratools.ops.compare_results import CompareReport

_EPILOG = """\b
Examples:
  loratools compare style.safetensors character.safetensors
  loratools compare kohya.safetensors peft_folder
  loratools compare A B C --suggest
  loratools compare A B --modules --components denoiser --exact
  loratools compare loras/*.safetensors --json
"""


@click.command("compare", epilog=_EPILOG)
@click.argument("paths", metavar="A B [C]...", nargs=-1, required=True, type=options.PATH)
@click.option(
    "--weights",
    callback=options.numbers,
    metavar="W,W,...",
    help="What each ΔW is multiplied by, such as 0.8,-0.5. Default: 1 each.",
)
@checkpoint_options.components
@click.option("--modules", is_flag=True, help="The figures of every module, too. For at most 16 adapters.")
@click.option("--suggest", is_flag=True, help="Say which merge method suits these adapters, and why.")
@click.option(
    "--exact",
    is_flag=True,
    help="Compute the sign conflict from every element instead of 64 rows of each weight.",
)
@click.option(
    "--base",
    type=options.PATH,
    metavar="BASE",
    help="The base model, for DoRA and the kinds whose ΔW depends on its weights.",
)
@click.option(
    "--device",
    callback=options.device,
    default="auto",
    metavar="DEVICE",
    help="Where to compute: auto (default), cpu, cuda or cuda:N.",
)
@options.arch
@options.common
@engine_options.running
def command(
    paths: Sequence[str],
    weights: tuple[float, ...] | None,
    as_json: bool,
    quiet: bool,
    **shared: Any,
) -> None:
    """How adapters relate, and where they would interfere.

    Everything is about ΔW, scale included, whatever the adapters' rank, layout and dtype. "Distance" is the norm of
    the difference as a share of the larger norm: two spellings of one adapter are told by it. "Outputs" and "inputs"
    are the overlap of column and row spaces, the mean squared cosine of their principal angles. "Conflict" is the
    share of Σ|a·b| that lies in elements of opposite signs, about a half for unrelated adapters.

    An adapter that lacks a module counts as 0 there. Overlap and conflict are for at most 16 adapters, cosines and
    distances for any number.
    """
    if len(paths) < 2:
        raise click.UsageError("there is one adapter. Give another one to compare it with.")
    checkpoint_options.one_weight_each(weights, paths)
    from loratools.ops import compare

    with output.progress("comparing", quiet=quiet) as progress:
        report = compare.compare(paths, weights=weights, progress=progress, **shared)
    _write(report, as_json=as_json, quiet=quiet)


def _write(report: CompareReport, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        from loratools.report import compare_data

        output.write_json(compare_data.compare_json(report))
    elif not quiet:
        from loratools.report.compare_text import compare_text

        output.write_report(lambda width, symbols: compare_text(report, width=width, symbols=symbols))
