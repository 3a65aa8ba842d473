"""``loratools merge``: several adapters into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import (
    beside_options,
    engine_options,
    merge_options,
    options,
    output,
    resume_options,
    weight_options,
)

if TYPE_CHECKING:
    from loratools.ops.merge_results import MergeReport

_EPILOG = """\b
Examples:
  loratools merge style.safetensors character.safetensors -o both.safetensors
  loratools merge A B C --weights 0.8,0.5,-0.3 -o mixed.safetensors
  loratools merge A B --component-weights text_encoder=0.5 --block-weights MID=0 -o out.safetensors
  loratools merge A B --weight-for 'layers.0-31=0..1' --weight-for 'mlp=0.4' -o merged_folder
  loratools merge A B --method ties --density 0.3 --rank 32 -o small.safetensors
  loratools merge style.safetensors B --protect style.safetensors -o both.safetensors
  loratools merge kohya.safetensors peft_folder --to peft -o merged_folder
  loratools merge dora_A dora_B --base base_folder --rank 32 -o merged_folder
  loratools merge A B --save-recipe mix.yaml -o out.safetensors
  loratools merge --recipe mix.yaml -o again.safetensors
  loratools merge A B -o out.safetensors --dry-run --json
"""


@click.command("merge", epilog=_EPILOG)
@click.argument("paths", metavar="A B [C]...", nargs=-1, type=options.PATH)
@weight_options.weighing
@click.option(
    "--method",
    callback=options.registered(*merge_options.METHODS, "method"),
    default="linear",
    metavar="NAME",
    help="How to combine. Default: linear, the exact weighted sum.",
)
@click.option(
    "--list-methods",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=merge_options.list_methods,
    help="List the methods with their options, and exit.",
)
@merge_options.method_options
@merge_options.steps
@beside_options.beside
@merge_options.recipes
@click.option(
    "--drop",
    type=click.Choice(["extras"]),
    multiple=True,
    metavar="KIND",
    help="Leave out what is in the way: extras, the tensors of no module. May be repeated.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Go on with NaN or Inf in a factor.")
@resume_options.resuming
@options.writing
@options.arch
@engine_options.running
@options.common
@click.pass_context
def command(
    ctx: click.Context, /, paths: Sequence[str], recipe: str | None, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Combine several adapters into one.

    The inputs may differ in rank, alpha, layout, dtype and in the modules they have; their architecture must
    be the same. Weights multiply ΔW, not its factors. The result is in the first input's layout, or in that
    of --to.

    "Energy kept" is the share of Σσ² that the result's rank holds of the method's full-rank result.

    What a long merge has done is written down as it goes, so that --resume can go on after a crash. Merges that
    decompose nothing (linear without a rank, concat) are done again instead: writing is all that they do.
    """
    if recipe is not None:
        merge_options.refuse_beside_recipe(ctx)
        report = _repeat(recipe, quiet=quiet, **given)
    elif given.pop("allow_urls"):
        raise click.UsageError("--allow-urls is about the URLs in a recipe. Add --recipe.")
    else:
        report = _merge(paths, quiet=quiet, **given)
    _write(report, dry_run=given["dry_run"], as_json=as_json, quiet=quiet)


def _merge(paths: Sequence[str], *, quiet: bool, method: str, **given: Any) -> MergeReport:
    if not paths:
        raise click.UsageError("Missing argument 'A B [C]...': the adapters to merge, or --recipe.")
    weights = given["weights"]
    if weights is not None and len(weights) != len(paths):
        message = f"{len(weights)} weights for {len(paths)} inputs. Give one for each."
        raise click.BadParameter(message, param_hint="'--weights'")
    for name in ("protect_energy", "protect_strength"):
        if given[name] is None:
            del given[name]
        elif not given["protect"]:
            raise click.UsageError(f"--{name.replace('_', '-')} is of no use without --protect.")
    chosen = merge_options.own(method, given)
    from loratools.ops import merge

    with output.progress("merging", quiet=quiet) as progress:
        return merge.merge_files(paths, method=method, progress=progress, **chosen, **given)


def _repeat(recipe: str, *, quiet: bool, device: str, **given: Any) -> MergeReport:
    from loratools.ops import merge

    with output.progress("merging", quiet=quiet) as progress:
        return merge.merge_recipe(
            recipe,
            given["output"],
            overwrite=given["overwrite"],
            dry_run=given["dry_run"],
            device=None if device == "auto" else device,
            progress=progress,
            engine=given["engine"],
            resume=given["resume"],
            allow_urls=given["allow_urls"],
        )


def _write(report: MergeReport, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    written = None if dry_run else report.output
    if as_json:
        from loratools.report.merge_data import merge_json

        output.write_json(merge_json(report, dry_run=dry_run), written=written)
    elif not quiet:
        from loratools.report.merge_text import merge_text

        output.write_report(
            lambda width, symbols: merge_text(report, width=width, symbols=symbols, dry_run=dry_run),
            written=written,
        )
