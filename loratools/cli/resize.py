"""``loratools resize``: one adapter at lower ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loratools.cli import engine_options, options, output, rank_options, resume_options

if TYPE_CHECKING:
    from loratools.ops.resize_results import ResizeReport

# Here and not from the operation, which takes a second to import for --help.
_SERVERS = ("vllm", "punica", "sglang")

_EPILOG = """\b
Examples:
  loratools resize style.safetensors -o small.safetensors --rank 16
  loratools resize style.safetensors -o small.safetensors --energy 0.95 --max-rank 32 --plot
  loratools resize style.safetensors -o small.safetensors --size 20MB
  loratools resize peft_folder -o served --rank 48 --to-rank-of vllm
  loratools resize dora.safetensors -o lora.safetensors --rank 32 --base model.safetensors
  loratools resize IN -o OUT --size 20MB --against model.safetensors --dry-run --json
"""


@click.command("resize", epilog=_EPILOG)
@click.argument("path", metavar="IN", type=options.PATH)
@rank_options.rules
@click.option(
    "--multiple-of",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Round ranks up to multiples of N, where the difference has as many.",
)
@click.option(
    "--to-rank-of",
    type=click.Choice(_SERVERS),
    help="One rank for all modules, the smallest that this program provides for and that holds what the rule asks for.",
)
@click.option(
    "--base",
    type=options.PATH,
    metavar="BASE",
    help="The model that IN was trained on, for DoRA, OFT and other kinds whose ΔW depends on its weights.",
)
@click.option(
    "--against",
    type=options.PATH,
    metavar="BASE",
    help="Score directions by what they change relative to BASE's weights: σ / ‖W‖. For --energy, --error, --ratio "
    "and --size.",
)
@click.option(
    "--against-norm",
    type=click.Choice(["frobenius", "spectral"]),
    default="frobenius",
    help="Which norm of W. Default: frobenius.",
)
@click.option("--plot", is_flag=True, help="Show the energy kept against the rank, for each component.")
@click.option(
    "--drop",
    multiple=True,
    metavar="KIND",
    help="Leave out what the layout of --to cannot hold: extras, bias, norm, … as convert has it. May be repeated.",
)
@resume_options.resuming
@options.writing
@options.arch
@engine_options.running
@options.common
def command(path: str, plot: bool, as_json: bool, quiet: bool, **shared: Any) -> None:
    """Cut an adapter to lower ranks, as little as the rule allows.

    Every ΔW is replaced by its nearest of a lower rank, by singular value decomposition. The rank is given by one of
    --rank, --energy, --ratio, --error and --size; --to-rank-of may stand alone. Ranks are exact minima: one fewer
    would miss what was asked for.

    LoHa, LoKr and other kinds become LoRA. Norms, biases and full differences are carried as they are.
    """
    _check(shared)
    from loratools.ops import resize

    with output.progress("resizing", quiet=quiet) as progress:
        here = shared.pop("output")
        report = resize.resize_file(path, here, progress=progress, **shared)
    _write(report, plot=plot, dry_run=shared["dry_run"], as_json=as_json, quiet=quiet)


def _check(given: dict[str, Any]) -> None:
    """Refuse options that contradict each other.

    Raises:
        click.UsageError: They do.
    """
    rank_options.refuse_two(given)
    rank_options.refuse_crossed(given["min_rank"], given["max_rank"])
    stated = [name for name in rank_options.RULES if given[name] is not None]
    if not stated and given["to_rank_of"] is None:
        names = ", ".join(f"--{name}" for name in rank_options.RULES)
        raise click.UsageError(f"No rank rule is given. Choose one of {names}.")


def _write(report: ResizeReport, *, plot: bool, dry_run: bool, as_json: bool, quiet: bool) -> None:
    written = None if dry_run else report.output
    if as_json:
        from loratools.report import resize_data

        output.write_json(resize_data.resize_json(report, dry_run=dry_run), written=written)
    elif not quiet:
        from loratools.report.resize_text import resize_text

        output.write_report(
            lambda width, symbols: resize_text(
                report, width=width, symbols=symbols, plot=plot, dry_run=dry_run
            ),
            written=written,
        )
