"""The rank rules on the command line: exactly one of five, with their limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import click

from loratools.cli.options import Decorated

RULES = ("rank", "energy", "ratio", "error", "size")
_SIZE = r"\d+(\.\d+)? *(([KMGT]i?)?B)?"
_CHOOSE = f"Choose one of {', '.join(f'--{name}' for name in RULES)}."


def rules(command: Decorated) -> Decorated:
    """--rank, --energy, --ratio, --error, --size, --max-rank, --min-rank and --conv-rank."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def refuse_two(given: Mapping[str, Any]) -> None:
    """Refuse more than one rank rule.

    Args:
        given: The options by name; those without a value do not count.

    Raises:
        click.UsageError: Two or more rules have a value.
    """
    stated = [name for name in RULES if given.get(name) is not None]
    if len(stated) > 1:
        found = " and ".join(f"--{name}" for name in stated)
        raise click.UsageError(f"{found} exclude each other. {_CHOOSE}")


def refuse_crossed(least: int, most: int | None) -> None:
    """Refuse a smallest rank above the largest.

    Raises:
        click.UsageError: They are crossed.
    """
    if most is not None and least > most:
        raise click.UsageError(f"--min-rank {least} is more than --max-rank {most}.")


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Callback of --size: the spelling is checked here; how many bytes it is, the operation knows."""
    if value is not None and not re.fullmatch(_SIZE, value.strip(), re.IGNORECASE):
        text = f"{value!r} is no size. Write a number and a unit: 20MB, 1.5GB, 64MiB."
        raise click.BadParameter(text, ctx, param)
    return value


def _finite_ratio(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Callback of --ratio: above 1 it is Kohya's sv_ratio, so there is no upper limit but infinity."""
    if value is not None and not 0.0 < value < float("inf"):
        raise click.BadParameter(f"{value} is not a finite number above 0.", ctx, param)
    return value


_OPTIONS = (
    click.option("--rank", type=click.IntRange(min=1), metavar="N", help="One rank for all, a count."),
    click.option(
        "--energy",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="F",
        help="The smallest rank that keeps this fraction of Σσ².",
    ),
    click.option(
        "--ratio",
        type=float,
        callback=_finite_ratio,
        metavar="F",
        help="As many as there are σ of at least this fraction of the largest; above 1: of at least its F-th part.",
    ),
    click.option(
        "--error",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        metavar="F",
        help="The smallest rank whose error is at most this fraction of ‖ΔW‖.",
    ),
    click.option(
        "--size",
        callback=_size,
        metavar="SIZE",
        help="The best file of at most this size (20MB, 64MiB): ranks are spent where they keep most.",
    ),
    click.option("--max-rank", type=click.IntRange(min=1), metavar="N", help="No rank above this."),
    click.option(
        "--min-rank",
        type=click.IntRange(min=1),
        default=1,
        metavar="N",
        help="No rank below this, where the difference has as many. Default: 1.",
    ),
    click.option(
        "--conv-rank",
        type=click.IntRange(min=0),
        metavar="N",
        help="Rank of convolutions with a kernel; 0 leaves them out. Default: as all others.",
    ),
)
