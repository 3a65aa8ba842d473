"""``loratools merge``: several adapters into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import options, output

if TYPE_CHECKING:
    from loratools.methods import Option
    from loratools.ops.results import MergeReport

_METHODS = ("loratools.methods", "METHOD")

_EPILOG = """\b
Examples:
  loratools merge style.safetensors character.safetensors -o both.safetensors
  loratools merge A B C --weights 0.8,0.5,-0.3 -o mixed.safetensors
  loratools merge A B --component-weights text_encoder=0.5 --block-weights MID=0 -o out.safetensors
  loratools merge A B --method ties --density 0.3 --rank 32 -o small.safetensors
  loratools merge kohya.safetensors peft_folder --to peft -o merged_folder
  loratools merge A B -o out.safetensors --dry-run --json
"""


def _list_methods(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Callback of --list-methods: print them, and leave before anything else is asked for."""
    if not value or ctx.resilient_parsing:
        return
    from loratools.registry import scan

    formatter = ctx.make_formatter()
    for name, method in scan(*_METHODS).items():
        with formatter.section(name):
            formatter.write_text(method.summary)
            if method.options:
                formatter.write_dl([(f"--{own.name}", _option_help(own)) for own in method.options])
    click.echo(formatter.getvalue(), nl=False)
    ctx.exit()


def _option_help(option: Option) -> str:
    return option.help if option.default is None else f"{option.help} Default: {option.default}."


@click.command("merge", epilog=_EPILOG)
@click.argument("paths", metavar="A B [C]...", nargs=-1, required=True, type=options.PATH)
@click.option(
    "--weights",
    callback=options.numbers,
    metavar="W,W,...",
    help="What each ΔW is multiplied by, such as 0.8,-0.5. Default: 1 each.",
)
@click.option(
    "--component-weights",
    callback=options.multipliers,
    multiple=True,
    metavar="NAME=W,...",
    help="Multipliers by component, such as text_encoder=0.5. Once for all inputs, or once for each.",
)
@click.option(
    "--block-weights",
    callback=options.multipliers,
    multiple=True,
    metavar="BLOCK=W,...",
    help="Multipliers by block (IN04, MID, OUT11; D07, S21; or the beginning of a path), or a vector of 12, 17, 20, "
    "26 or 61 numbers. Once for all inputs, or once for each.",
)
@click.option(
    "--method",
    callback=options.registered(*_METHODS, "method"),
    default="linear",
    metavar="NAME",
    help="How to combine. Default: linear, the exact weighted sum.",
)
@click.option(
    "--list-methods",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_methods,
    help="List the methods with their options, and exit.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rank of the result, a count. Default: lossless where the method allows it.",
)
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="F",
    help="Method option: the fraction of each ΔW's elements kept.",
)
@click.option(
    "--lambda", "lam", type=float, metavar="F", help="Method option: what the merged ΔW is multiplied by."
)
@click.option("--seed", type=int, metavar="N", help="Method option: seed of whatever is random.")
@click.option(
    "--drop",
    type=click.Choice(["extras"]),
    multiple=True,
    metavar="KIND",
    help="Leave out what is in the way: extras, the tensors of no module. May be repeated.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Go on with NaN or Inf in a factor.")
@options.writing
@options.arch
@options.common
def command(
    paths: Sequence[str],
    weights: tuple[float, ...] | None,
    method: str,
    rank: int | None,
    density: float | None,
    lam: float | None,
    seed: int | None,
    as_json: bool,
    quiet: bool,
    **shared: Any,
) -> None:
    """Combine several adapters into one.

    The inputs may differ in rank, alpha, layout, dtype and in the modules they have; their architecture must
    be the same. Weights multiply ΔW, not its factors. The result is in the first input's layout, or in that
    of --to.

    "Energy kept" is the share of Σσ² that the result's rank holds of the method's full-rank result.
    """
    if weights is not None and len(weights) != len(paths):
        message = f"{len(weights)} weights for {len(paths)} inputs. Give one for each."
        raise click.BadParameter(message, param_hint="'--weights'")
    own = _own_options(method, {"rank": rank, "density": density, "lambda": lam, "seed": seed})
    from loratools.ops import merge

    with output.progress("merging", quiet=quiet) as progress:
        report = merge.merge_files(paths, weights=weights, method=method, progress=progress, **own, **shared)
    _write(report, dry_run=shared["dry_run"], as_json=as_json, quiet=quiet)


def _own_options(method: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The method options that were given, under the names that the operation knows them by.

    Raises:
        click.UsageError: One that the method does not have; the message names the methods that have it.
    """
    given = {name: value for name, value in stated.items() if value is not None}
    if not given:
        return {}
    from loratools.registry import scan

    methods = scan(*_METHODS)
    fields = {each.name: each.field for each in methods[method].options}
    for name in given:
        if name not in fields:
            having = [key for key, each in methods.items() if name in {own.name for own in each.options}]
            raise click.UsageError(
                f"--{name} is not an option of the method {method}. These have it: {', '.join(having)}."
            )
    return {fields[name]: value for name, value in given.items()}


def _write(report: MergeReport, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    written = None if dry_run else report.output
    if as_json:
        from loratools.report import data

        output.write_json(data.merge_json(report, dry_run=dry_run), written=written)
    elif not quiet:
        from loratools.report.merge_text import merge_text

        output.write_report(
            lambda width, symbols: merge_text(report, width=width, symbols=symbols, dry_run=dry_run),
            written=written,
        )
