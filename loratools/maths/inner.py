"""Inner products of low-rank matrices, from Gram matrices of their factors alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loratools.maths.lowrank import COMPUTE, Factors


def inner_products(parts: Sequence[Factors], weights: Sequence[float]) -> torch.Tensor:
    """⟨ΔWᵢ, ΔWⱼ⟩ = Σ (upᵢᵀupⱼ) ∘ (downᵢdownⱼᵀ), times the weights: (T, T) float64, on the CPU.

    Args:
        parts: At least one, all of one shape (out, in).
        weights: What each product is multiplied by.
    """
    wide = [part.to(COMPUTE) for part in parts]
    found = torch.zeros(len(parts), len(parts), dtype=COMPUTE, device="cpu")
    for row, one in enumerate(wide):
        for column, other in enumerate(wide[: row + 1]):
            value = ((one.up.T @ other.up) * (one.down @ other.down.T)).sum() * weights[row] * weights[column]
            found[row, column] = found[column, row] = float(value)
    return found
