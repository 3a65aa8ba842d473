"""``loratools extract``: an adapter from the difference of two checkpoints."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import (
    checkpoint_options,
    engine_options,
    options,
    output,
    rank_options,
    resume_options,
)

if TYPE_CHECKING:
    from loratools.ops.checkpoint_results import ExtractReport

_DEFAULT_RANK = 32

_EPILOG = """\b
Examples:
  loratools extract base.ckpt tuned.ckpt --rank 32
  loratools extract BASE TUNED --energy 0.95 --max-rank 128 -o style.safetensors
  loratools extract model_folder tuned_folder --size 50MB --to peft
  loratools extract BASE TUNED --include attn --exclude 'ff\\.net' --components denoiser
  loratools extract BASE TUNED --rank 64 --dry-run --json
"""


def _patterns(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Callback of --include and --exclude: regular expressions that compile."""
    for text in value:
        try:
            re.compile(text)
        except re.error as error:
            raise click.BadParameter(f"{text!r} is no regular expression: {error}.", ctx, param) from None
    return value


@click.command("extract", epilog=_EPILOG)
@click.argument("base", metavar="BASE", type=options.PATH)
@click.argument("tuned", metavar="TUNED", type=options.PATH)
@rank_options.rules
@checkpoint_options.components
@click.option(
    "--include",
    callback=_patterns,
    multiple=True,
    metavar="REGEX",
    help="Only weights whose name has a match. May be repeated: one of them.",
)
@click.option(
    "--exclude",
    callback=_patterns,
    multiple=True,
    metavar="REGEX",
    help="No weights whose name has a match. May be repeated.",
)
@click.option("--embeddings", is_flag=True, help="Extract embeddings, too.")
@click.option(
    "--full-small", is_flag=True, help="Take biases and norms along as full differences, which have no rank."
)
@click.option(
    "--svd",
    type=click.Choice(["auto", "exact", "randomized"]),
    default="auto",
    metavar="HOW",
    help="How to decompose: auto (default), exact or randomized.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=1e-3,
    metavar="F",
    help="Randomized: how much larger than the best possible an error may be, as a fraction. Default: 0.001.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of randomized.")
@resume_options.resuming
@options.extracting
@options.arch
@engine_options.running
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    base: str,
    tuned: str,
    layout: str | None,
    as_json: bool,
    quiet: bool,
    **shared: Any,
) -> None:
    """Make a LoRA from the difference of two checkpoints.

    BASE and TUNED may differ in container, sharding and dtype; each weight's difference TUNED − BASE is taken in
    float32 and decomposed by SVD, one weight at a time. Weights that do not differ are skipped.

    The rank is given by one of --rank, --energy, --ratio, --error and --size. Default: --rank 32.
    """
    rank_options.refuse_two(shared)
    rank_options.refuse_crossed(shared["min_rank"], shared["max_rank"])
    if all(shared[name] is None for name in rank_options.RULES):
        shared["rank"] = _DEFAULT_RANK
    from loratools.ops import extract

    if resume_options.cleaning(ctx):
        rule = {name: shared[name] for name in rank_options.RULES}
        named = extract.default_output(tuned, to=layout, arch=shared["arch"], **rule)
        resume_options.clean(named, as_json=as_json, quiet=quiet)
        return
    with output.progress("extracting", quiet=quiet, in_bytes=True) as progress:
        rule = {name: shared[name] for name in rank_options.RULES}
        here = shared.pop("output") or extract.default_output(tuned, to=layout, arch=shared["arch"], **rule)
        ctx.params["output"] = here  # where an interrupted run says that something is kept
        _, report = extract.extract(base, tuned, here, to=layout, progress=progress, **shared)
    _write(report, dry_run=shared["dry_run"], as_json=as_json, quiet=quiet)


def _write(report: ExtractReport, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    written = None if dry_run else report.output
    if as_json:
        from loratools.report import checkpoint_data

        output.write_json(checkpoint_data.extract_json(report, dry_run=dry_run), written=written)
    elif not quiet:
        from loratools.report.extract_text import extract_text

        output.write_report(
            lambda width, symbols: extract_text(report, width=width, symbols=symbols, dry_run=dry_run),
            written=written,
        )
