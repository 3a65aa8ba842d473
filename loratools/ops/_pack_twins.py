"""Adapters that do the same under another spelling: found by what ΔW does to random vectors, confirmed in factor space.

A few numbers of each adapter's sketch, divided into cells, lead to the few others that could be the same; only these
are compared as they are, first by their sketches, then by ‖ΔW − ΔW'‖ of every module, without building ΔW.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from loratools.maths import normal_form
from loratools.maths.normal_form import Stacked
from loratools.ops._pack_normal import Normal

SAME = {"F64": 1e-12, "F32": 1e-6, "F16": 2e-3, "BF16": 1.6e-2}
"""The relative difference of one module's ΔW that rounding to a dtype explains: some four units of roundoff.

Each of two factors is off by half a unit in the last place at most, on both sides, and a folded scale by as much.
"""
_SAME_BELOW = 0.25  # of dtypes of eight bits
MARKS = 64
"""Numbers that are kept of each adapter."""
_NUMBERS = 3  # of these that decide on its cell
_CELL = 0.25  # in standard deviations of these numbers
# A sketch estimates the difference of few modules badly: what passes is compared exactly.
_SLACK = 8.0


def tolerance(one: str, other: str) -> float:
    """The relative difference up to which adapters of two store dtypes are the same."""
    return max(SAME.get(dtype, _SAME_BELOW) for dtype in (one, other))


def _apart(limit: float) -> float:
    """The relative difference of marks up to which adapters are compared: unrelated ones are √2 apart."""
    return min(_SLACK * limit, max(1.0, 2.0 * limit))


def marks(sketch: torch.Tensor) -> torch.Tensor:
    """What is kept of an adapter's sketch, however many modules it has: (64,) float64."""
    return normal_form.projected(sketch, MARKS)


class Twins:
    """The adapters met so far, by what they do.

    Args:
        limit: The relative difference up to which two are the same; None: by their dtypes; 0: no two are.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._cells: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        self._met: list[tuple[str, torch.Tensor, str]] = []
        self._width = max(_CELL, _apart(limit or 0.0))
        self._coarsest = 0.0

    def limit(self, one: str, other: str) -> float:
        """The relative difference up to which adapters of two store dtypes are taken for the same."""
        return tolerance(one, other) if self._limit is None else self._limit

    def candidates(self, key: str, found: torch.Tensor, dtype: str) -> Iterator[str]:
        """The names of those that could be the same, in the order in which they were added.

        Args:
            key: What the same adapters have in common: the names and shapes of their modules.
            found: Of ``marks``.
            dtype: The store dtype.
        """
        if self._limit == 0.0:
            return
        cell, reach = self._cell(found), self._reach(dtype)
        around = itertools.product(range(-reach, reach + 1), repeat=_NUMBERS)
        near = [
            self._cells.get((key, tuple(a + b for a, b in zip(cell, step, strict=True))), ())
            for step in around
        ]
        size = float(found.norm())
        for number in sorted(itertools.chain(*near)):
            name, other, its = self._met[number]
            away = float((other - found).norm())
            if away <= _apart(self.limit(dtype, its)) * size:
                yield name

    def _reach(self, dtype: str) -> int:
        """How many cells away one that is the same may lie: more than one where values have eight bits."""
        return max(1, math.ceil(_apart(max(self._coarsest, self.limit(dtype, dtype))) / self._width))

    def add(self, name: str, key: str, found: torch.Tensor, dtype: str) -> None:
        """Remember an adapter by its ``marks``."""
        self._coarsest = max(self._coarsest, self.limit(dtype, dtype))
        self._cells.setdefault((key, self._cell(found)), []).append(len(self._met))
        self._met.append((name, found, dtype))

    def _cell(self, found: torch.Tensor) -> tuple[int, ...]:
        size = float(found.norm()) or 1.0
        numbers = (math.sqrt(MARKS) / size * found[:_NUMBERS]).tolist()
        return tuple([math.floor(number / self._width) for number in numbers])


def difference(one: Normal, other: Normal, limit: float) -> float | None:
    """‖ΔW − ΔW'‖_F over the larger norm, over all modules; None where some module's is above a limit.

    Args:
        one: An adapter.
        other: One with modules of the same names and shapes.
        limit: The relative difference of one module up to which it is the same.
    """
    away = size = 0.0
    theirs = other.by_name()
    for members, stacked in zip(one.plan.groups, one.stacks, strict=True):
        names = [str(module.target) for module in members]
        for mine, own in _alike(names, stacked, theirs):
            apart, norms = normal_form.differences(mine, own)
            if not bool((apart <= limit * norms).all()):
                return None
            away += float(apart.square().sum())
            size += float(norms.square().sum())
    return math.sqrt(away / size) if size else 0.0


def _alike(
    names: Sequence[str], stacked: Stacked, theirs: dict[str, tuple[Stacked, int]]
) -> Iterator[tuple[Stacked, Stacked]]:
    """The modules of one stack beside those of the other adapter, by the other's rank."""
    by_rank: dict[int, list[int]] = {}
    for place, name in enumerate(names):
        by_rank.setdefault(theirs[name][0].up.shape[2], []).append(place)
    for places in by_rank.values():
        others = [theirs[names[place]] for place in places]
        yield (
            Stacked(stacked.up[places], stacked.down[places]),
            Stacked(
                torch.stack([each.up[place] for each, place in others]),
                torch.stack([each.down[place] for each, place in others]),
            ),
        )
