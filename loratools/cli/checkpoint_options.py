"""Options of the commands that work on checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from loratools.cli.options import Decorated, Decorator, numbers


def strengths(command: Decorated) -> Decorated:
    """--weights, --components and --skip-missing: what of adapters goes into a checkpoint, and how strongly."""
    for option in reversed((_weights, components, _skip_missing)):
        command = option(command)
    return command


def components(command: Decorated) -> Decorated:
    """--components."""
    return click.option(
        "--components",
        callback=_names,
        metavar="NAME,...",
        help="Only these: denoiser, text_encoder, text_encoder_2, language_model, ... Default: all.",
    )(command)


def one_weight_each(weights: Sequence[float] | None, adapters: Sequence[str]) -> None:
    """Refuse --weights that are not as many as the adapters.

    Raises:
        click.BadParameter: They are not.
    """
    if weights is not None and len(weights) != len(adapters):
        found = f"{len(weights)} weight{'' if len(weights) == 1 else 's'} for {len(adapters)}"
        message = f"{found} adapter{'' if len(adapters) == 1 else 's'}. Give one for each."
        raise click.BadParameter(message, param_hint="'--weights'")


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Callback for names with commas between them; which ones there are, the operation knows."""
    if value is None:
        return None
    found = tuple(name.strip() for name in value.split(","))
    if not all(found):
        text = f"{value!r} has an empty name. Write names with commas between: denoiser,text_encoder."
        raise click.BadParameter(text, ctx, param)
    return found


_weights: Decorator[Any] = click.option(
    "--weights",
    callback=numbers,
    metavar="W,W,...",
    help="What each ΔW is multiplied by, such as 0.8,-0.5. Default: 1 each.",
)
_skip_missing: Decorator[Any] = click.option(
    "--skip-missing", is_flag=True, help="Leave out modules that BASE has no weight for, and list them."
)
