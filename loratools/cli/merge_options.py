"""Options of merging: every method's own, the steps around a method, and recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import options, output
from loratools.cli.options import Decorated

if TYPE_CHECKING:
    from loratools.methods import Method, Option

METHODS = ("loratools.methods", "METHOD")

# What a recipe leaves open: it says all the rest.
_BESIDE_A_RECIPE = {
    "recipe",
    "allow_urls",
    "resume",
    "engine",
    "ray_address",
    "workers",
    "devices",
    "output",
    "overwrite",
    "dry_run",
    "device",
    "as_json",
    "quiet",
    "threads",
    "debug",
}


def method_options(command: Decorated) -> Decorated:
    """--rank and every other option that some method has."""
    for option in reversed(_METHOD_OPTIONS):
        command = option(command)
    return command


def steps(command: Decorated) -> Decorated:
    """--protect, its two settings, and --boost."""
    for option in reversed(_STEPS):
        command = option(command)
    return command


def recipes(command: Decorated) -> Decorated:
    """--recipe, --save-recipe and --allow-urls."""
    for option in reversed(_RECIPES):
        command = option(command)
    return command


def own(method: str, given: MutableMapping[str, Any]) -> dict[str, Any]:
    """Takes the method options out of a command's values and checks them.

    Args:
        method: The method's name.
        given: A command's values, which lose those of ``method_options``.

    Returns:
        Those that have a value, under the names that the operation knows them by.

    Raises:
        click.UsageError: One that the method does not have; the message names those that it has.
        click.BadParameter: A value out of the range that the method declares.
    """
    stated = {name: given.pop(param) for param, name in _NAMES.items()}
    chosen = {name: value for name, value in stated.items() if value is not None}
    if not chosen:
        return {}
    from loratools.registry import scan

    methods: Mapping[str, Method] = scan(*METHODS)
    declared: dict[str, Option] = {each.name: each for each in methods[method].options}
    for name, value in chosen.items():
        if name not in declared:
            raise click.UsageError(_foreign(name, method, methods))
        if not declared[name].check(value):
            message = f"{value} is not {declared[name].valid}."
            raise click.BadParameter(message, param_hint=f"'--{name}'")
    return {declared[name].field: value for name, value in chosen.items()}


def _foreign(name: str, method: str, methods: Mapping[str, Method]) -> str:
    taken = [f"--{each.name}" for each in methods[method].options]
    having = [key for key, each in methods.items() if name in {option.name for option in each.options}]
    return (
        f"--{name} is not an option of the method {method}, which takes {', '.join(taken) or 'none'}. "
        f"These have it: {', '.join(having) or 'none'}."
    )


def refuse_beside_recipe(ctx: click.Context) -> None:
    """Refuse whatever else a recipe says already.

    Raises:
        click.UsageError: Some of it was given on the command line, too.
    """
    given = [
        param
        for param in ctx.command.params
        if param.name not in _BESIDE_A_RECIPE
        and ctx.get_parameter_source(param.name or "") is click.core.ParameterSource.COMMANDLINE
        and ctx.params.get(param.name or "") not in (None, ())
    ]
    if given:
        names = ", ".join(each.opts[0] if isinstance(each, click.Option) else "inputs" for each in given)
        raise click.UsageError(
            f"--recipe says everything of a merge but where it goes, and {names} was given too. Leave it out, or "
            "change the recipe."
        )


def list_methods(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Callback of --list-methods: print them, and leave before anything else is asked for."""
    if not value or ctx.resilient_parsing:
        return
    from loratools.registry import scan

    methods: Mapping[str, Method] = scan(*METHODS)
    width = max(map(len, methods))
    for name, method in methods.items():
        output.write_text(f"{name:{width}}  {method.summary}")
    output.write_text("")
    formatter = ctx.make_formatter()
    with formatter.section("Options"):
        formatter.write_dl(
            [(f"--{option.name}", _explained(option, of)) for option, of in _declared(methods).values()]
        )
    output.write_text(formatter.getvalue(), end="")
    ctx.exit()


def _declared(methods: Mapping[str, Method]) -> dict[str, tuple[Option, list[str]]]:
    """Every option that methods declare, with the names of those methods."""
    found: dict[str, list[tuple[str, Option]]] = {}
    for name, method in methods.items():
        for option in method.options:
            found.setdefault(option.name, []).append((name, option))
    return {
        name: (_usual([each for _, each in of]), [method for method, _ in of]) for name, of in found.items()
    }


def _usual(declared: list[Option]) -> Option:
    """The option as most methods explain it; some have words of their own."""
    helps = [each.help for each in declared]
    return max(declared, key=lambda each: helps.count(each.help))


def _explained(option: Option, of: list[str]) -> str:
    default = "" if option.default is None else f" Default: {option.default}."
    return f"{option.help}{default} Of: {', '.join(of)}."


def _finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Callback for a finite number."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.", ctx, param)
    return value


_METHOD_OPTIONS = (
    click.option(
        "--rank",
        type=click.IntRange(min=1),
        metavar="N",
        help="Rank of the result, a count. Default: lossless where the method allows it.",
    ),
    click.option(
        "--density",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="F",
        help="Method option: the fraction of each ΔW's elements kept.",
    ),
    click.option(
        "--lambda",
        "lam",
        type=float,
        metavar="F",
        help="Method option: what the merged ΔW is multiplied by.",
    ),
    click.option("--seed", type=int, metavar="N", help="Method option: seed of whatever is random."),
    click.option(
        "--majority",
        type=click.Choice(["total", "frequency"]),
        help="Method option: whether a sign is elected by the sum of values, or by their number.",
    ),
    click.option(
        "--epsilon",
        type=float,
        metavar="F",
        help="Method option: how far the probabilities of being kept lie apart.",
    ),
    click.option(
        "--gamma",
        type=float,
        metavar="F",
        help="Method option: the fraction of the largest elements that is removed.",
    ),
    click.option(
        "--common",
        type=float,
        metavar="F",
        help="Method option: the fraction of the result's directions that all adapters share.",
    ),
    click.option(
        "--part-rank",
        type=int,
        metavar="N",
        help="Method option: how many directions of each adapter are used, a count.",
    ),
    click.option(
        "--beta",
        type=float,
        metavar="F",
        help="Method option: the share that the past keeps in a moving average.",
    ),
    click.option(
        "--width",
        type=float,
        metavar="F",
        help="Method option: the relative width of a power-function average; 0 for a moving average.",
    ),
)
# The command's names of the method options, and the methods' own.
_NAMES = {
    "rank": "rank", "density": "density", "lam": "lambda", "seed": "seed", "majority": "majority",
    "epsilon": "epsilon", "gamma": "gamma", "common": "common", "part_rank": "part-rank",
    "beta": "beta", "width": "width",
}  # fmt: skip
_STEPS = (
    click.option(
        "--protect",
        multiple=True,
        type=options.PATH,
        metavar="PATH",
        help="Keep the other inputs off this adapter's main directions, before any method. May be repeated.",
    ),
    click.option(
        "--protect-energy",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="F",
        help="Its main directions: the first that hold this fraction of Σσ². Default: 1, all of them.",
    ),
    click.option(
        "--protect-strength",
        type=click.FloatRange(0),
        callback=_finite,
        metavar="F",
        help="Take away the share F / (1 + F) of what lies in them. Default: all of it.",
    ),
    click.option(
        "--boost",
        type=click.FloatRange(0, 1),
        metavar="F",
        help="After any method, raise the singular values that lie behind this fraction of Σσ, to the one there.",
    ),
)
_RECIPES = (
    click.option(
        "--recipe",
        metavar="FILE",
        type=options.PATH,
        help="Repeat the merge that a recipe describes (.json, .yaml), in the place of inputs and options.",
    ),
    click.option(
        "--save-recipe",
        metavar="FILE",
        type=options.PATH,
        help="Write a recipe of this merge, by which --recipe repeats it bit for bit.",
    ),
    click.option(
        "--allow-urls",
        is_flag=True,
        help="With --recipe: read inputs that it names by URLs. Default: such a recipe is refused.",
    ),
)
