"""Options for the weights of a merge: per input, per component, per block and per pattern."""

from __future__ import annotations

import click

from loratools.cli import options
from loratools.cli.options import Decorated


def weighing(command: Decorated) -> Decorated:
    """--weights, --component-weights, --block-weights and --weight-for."""
    for option in reversed(_WEIGHTS):
        command = option(command)
    return command


def _blocks(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> list[dict[str, float] | tuple[float, ...] | str]:
    """Callback of --block-weights: names and weights, a vector of numbers, or a preset's name."""
    from loratools.archs._blocks import PRESETS

    found: list[dict[str, float] | tuple[float, ...] | str] = []
    for text in value:
        if text.strip().upper() in PRESETS:
            found.append(text.strip().upper())
        elif text.strip() and text.strip()[0].isalpha() and "=" not in text and "," not in text:
            message = (
                f"{text!r} is no preset, and has no weight. Write IN04=0.5, or one of {', '.join(PRESETS)}."
            )
            raise click.BadParameter(message, ctx, param)
        else:
            found += options.multipliers(ctx, param, (text,))
    return found


def _patterns(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, float | str]:
    """Callback of --weight-for: each a pattern, an equals sign and a weight."""
    found: dict[str, float | str] = {}
    for text in value:
        # A regular expression may have equals signs of its own, a weight has none.
        pattern, equals, weight = text.rpartition("=")
        if not equals or not pattern:
            message = f"{text!r} is no PATTERN=WEIGHT, such as layers.0-11=0.5."
            raise click.BadParameter(message, ctx, param)
        if pattern in found:
            raise click.BadParameter(f"{pattern!r} has two weights. Give it one.", ctx, param)
        found[pattern] = weight.strip()
    if found:
        from loratools.errors import OptionError
        from loratools.ops import _weight_patterns

        try:
            _weight_patterns.rules(found)
        except OptionError as error:
            raise click.BadParameter(str(error), ctx, param) from None
    return found


_WEIGHTS = (
    click.option(
        "--weights",
        callback=options.numbers,
        metavar="W,W,...",
        help="What each ΔW is multiplied by, such as 0.8,-0.5. Default: 1 each.",
    ),
    click.option(
        "--component-weights",
        callback=options.multipliers,
        multiple=True,
        metavar="NAME=W,...",
        help="Multipliers by component, such as text_encoder=0.5. Once for all inputs, or once for each.",
    ),
    click.option(
        "--block-weights",
        callback=_blocks,
        multiple=True,
        metavar="BLOCK=W,...",
        help="Multipliers by block (IN04, MID, OUT11; D07, S21; or the beginning of a path), a vector of 12, 17, 20, "
        "26 or 61 numbers, or a preset: ALL, NONE, INS, IND, INALL, MIDD, OUTD, OUTS, OUTALL. Once for all inputs, or "
        "once for each.",
    ),
    click.option(
        "--weight-for",
        callback=_patterns,
        multiple=True,
        metavar="PATTERN=W",
        help="A multiplier for modules whose path has a match of a regular expression (attn=0.4), or for layers "
        "(layers.0-11=0.5; with a gradient layers.0-31=0..1); after 2: for the second input alone. May be repeated: "
        "the last match counts.",
    ),
)
