"""A matrix of low rank near another one, however it was found."""

from __future__ import annotations

from typing import NamedTuple

import torch

from loratools.maths.rank import Float64


class Approximation(NamedTuple):
    """The leading part of a decomposition of D, and what it leaves out.

    Attributes:
        u: (out, k) float64.
        sigma: (k,) float64.
        vh: (k, in) float64.
        lost: ‖D − u·σ·vh‖_F².
        gap: A bound of what the best approximation of rank k holds more.
        values: All singular values that are known, descending; of a search beyond k, lower bounds.
    """

    u: torch.Tensor
    sigma: torch.Tensor
    vh: torch.Tensor
    lost: float
    gap: float
    values: Float64


def polished(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The decomposition of left @ rightᵀ, where left = D·right and right is orthonormal but for rounding.

    Args:
        left: (out, k) float64, of any condition.
        right: (in, k) float64.

    Returns:
        u (out, k), sigma (k,) descending and vh (k, in); orthonormal to float64's rounding.
    """
    right, mixing = torch.linalg.qr(right)
    # D·right·mixing⁻¹: the images of what is orthonormal now.
    left = torch.linalg.solve_triangular(mixing, left, upper=True, left=False)
    columns, core = torch.linalg.qr(left)
    u, sigma, vh = torch.linalg.svd(core)
    return columns @ u, sigma, vh @ right.mT
