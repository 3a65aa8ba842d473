"""One alpha for all modules, for layouts that state no more: what is left of a module's scale goes into its factors."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from loratools.errors import LoraError
from loratools.model import Module, Target
from loratools.ops import _scale
from loratools.ops._regroup import Step

_LARGEST = 3.4028234e38  # of float32


def steps(given: Sequence[Step], dtype: str) -> list[Step]:
    """Steps whose modules' scales are one alpha over their ranks.

    The alpha is that of most modules, rounded to float32, in which it is stated; modules of another by a power of two
    are not rounded.

    Args:
        given: Steps of an adapter.
        dtype: The store dtype of factors that change, or empty for each tensor's own.
    """
    alpha = _of_most(step.module for step in given if step.problem is None)
    if alpha is None:
        return list(given)
    found: list[Step] = []
    for step in given:
        try:
            module, rounded = _restated(step.module, alpha, dtype)
        except LoraError as error:
            found.append(step._replace(problem=step.problem or error))
            continue
        found.append(step._replace(module=module, rounded=step.rounded or rounded))
    return found


def modules(given: Mapping[Target, Module]) -> dict[Target, Module]:
    """Modules whose scales are one alpha over their ranks, as in ``steps``.

    Raises:
        UnsupportedKindError: A module's kind has no pair of factors to fold a scale into.
    """
    alpha = _of_most(given.values())
    if alpha is None:
        return dict(given)
    return {target: _restated(module, alpha, "")[0] for target, module in given.items()}


def _of_most(given: Iterable[Module]) -> float | None:
    """The alpha of most modules; None where all scales are 1, which needs none."""
    scaled = [module for module in given if module.rank]
    if all(module.scale == 1.0 for module in scaled):
        return None
    alphas = Counter(alpha for module in scaled if (alpha := _alpha(module)) and math.isfinite(alpha))
    # 0 would be read as a scale of 1: such modules get zeros for factors.
    return max(alphas, key=lambda each: (alphas[each], -each), default=1.0)


def _alpha(module: Module) -> float:
    """The alpha that states a module's scale, as float32; infinite where that cannot hold it."""
    value = module.scale * (module.rank or 1)
    return float(struct.unpack("<f", struct.pack("<f", value))[0]) if abs(value) <= _LARGEST else math.inf


def _restated(module: Module, alpha: float, dtype: str) -> tuple[Module, bool]:
    if not module.rank or _alpha(module) == alpha:
        return module, False
    return _scale.restated(module, alpha / module.rank, dtype)
