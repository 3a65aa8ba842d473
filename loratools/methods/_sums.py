"""Weighted sums of several weights at once, for methods that are such a sum."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.lowrank_batch import compress_batch, stacked
from loratools.methods._base import Outcome, Part


def sums(batch: Sequence[Sequence[Part]], rank: int | None) -> list[Outcome]:
    """Σ weightⱼ · scaleⱼ · ΔWⱼ of every weight, or the nearest matrix of a rank.

    Args:
        batch: The parts of every weight; the j-th of all have factors of one shape and rank.
        rank: A count, or None for the numerical rank of each sum.
    """
    factors = [[part.factors for part in parts] for parts in batch]
    weights = [[part.multiplier for part in parts] for parts in batch]
    found = compress_batch(stacked(factors, weights), [rank] * len(batch))
    return [Outcome(each.factors, each.energy, each.square) for each in found]
