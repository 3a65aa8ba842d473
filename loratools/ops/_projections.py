"""VeRA's shared projections where the file has none: drawn anew, as wide as the widest weight of the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loratools.kinds import vera
from loratools.model import Module


def completed(modules: Sequence[Module], inputs: Callable[[Module], int | None]) -> list[Module]:
    """Modules with the projections that they lack, as PEFT draws them.

    Args:
        modules: All of an adapter: the widest of them tells how many numbers were drawn.
        inputs: How many inputs the base's weight of a module has; None where it has none.

    Returns:
        The modules; as they are where the base lacks a weight, without which nobody knows what was drawn.
    """
    lacking = {module.target: key for module in modules if (key := _seed(module)) is not None}
    if not lacking:
        return list(modules)
    members = [module for module in modules if module.target in lacking]
    widths = [inputs(module) for module in members]
    known = [width for width in widths if width is not None]
    if len(known) < len(widths):
        return list(modules)
    outputs = max(module.factors["vera_lambda_b"].numel for module in members)
    return [
        _with_pair(module, lacking[module.target], outputs, max(known))
        if module.target in lacking
        else module
        for module in modules
    ]


def _seed(module: Module) -> int | None:
    return vera.seed(module) if module.kind == "vera" else None


def _with_pair(module: Module, key: int, outputs: int, inputs: int) -> Module:
    rank = module.factors["vera_lambda_d"].numel
    first, second = vera.drawn(key, rank, outputs, inputs)
    return module._replace(factors={**module.factors, "vera_a": first, "vera_b": second})
