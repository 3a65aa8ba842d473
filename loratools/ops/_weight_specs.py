"""Sets of multipliers as callers give them, and as a recipe repeats them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from loratools.ops._weights import Spec


def specs(given: Spec | Sequence[Spec]) -> list[Spec]:
    """One set for all inputs as a list of one."""
    if isinstance(given, Mapping | str):
        return [given] if given else []
    vector = [float(each) for each in given if isinstance(each, Real)]
    return [vector] if vector else [each for each in given if isinstance(each, Mapping | Sequence)]


def plain(spec: Spec) -> Any:
    """A set of multipliers as JSON has it, whatever types its numbers are of."""
    if isinstance(spec, str):
        return spec
    if isinstance(spec, Mapping):
        return {name: float(weight) for name, weight in spec.items()}
    return [float(weight) for weight in spec]
