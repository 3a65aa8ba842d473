"""Options for what lies beside the factors of adapters that are merged."""

from __future__ import annotations

import click

from loratools.cli import options
from loratools.cli.options import Decorated

_WAYS = ("refuse", "first", "average", "sum")


def beside(command: Decorated) -> Decorated:
    """--full-modules and --base: what lies beside the factors, and what is needed to tell its change."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def _way(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Callback for one of the ways, or a number."""
    if value not in _WAYS and not (value.isdecimal() and int(value) > 0):
        message = f"{value} is none of {', '.join(_WAYS)}, and no input's number."
        raise click.BadParameter(message, ctx, param)
    return value


_OPTIONS = (
    click.option(
        "--full-modules",
        callback=_way,
        default="refuse",
        metavar="WAY",
        help="Where inputs differ on what they save in full (modules_to_save, biases, tokens): refuse, first, average "
        "(by the weights), sum (of the differences from --base), or an input's number. Default: refuse.",
    ),
    click.option(
        "--base",
        type=options.PATH,
        metavar="PATH",
        help="The model that the inputs were trained on: for DoRA, with --rank; for the sum of biases; and for which "
        "rows of its fused weights are whose.",
    ),
)
