"""A matrix of low rank near another one, however it was found."""

from __future__ import annotations

from typing import NamedTuple

import torch

from loratools.maths.rank import Float64

# Of the diagonal of a Cholesky factor: above this ratio, two passes are orthonormal to float64's rounding.
_RESOLVED = 1e-5


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
        left: (out, k), of any condition.
        right: (in, k).

    Returns:
        u (out, k), sigma (k,) descending and vh (k, in); orthonormal to float64's rounding.
    """
    right, mixing = _orthonormal(right.to(torch.float64))
    # D·right·mixing⁻¹: the images of what is orthonormal now.
    left = torch.linalg.solve_triangular(mixing, left.to(torch.float64), upper=True, left=False)
    columns, core = _orthonormal(left)
    u, sigma, vh = torch.linalg.svd(core)
    return columns @ u, sigma, vh @ right.mT


def _orthonormal(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal columns times an upper triangle: by Cholesky's way twice, or Householder's, which is slower.

    Yamamoto, Nakatsukasa, Yanagisawa, Fukaya: "Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 44, 2015.
    """
    found, whole = columns, torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
    for _ in range(2):
        upper, failed = torch.linalg.cholesky_ex(found.mT @ found, upper=True)
        least, most = torch.aminmax(upper.diagonal()) if upper.numel() else (upper, upper)
        if bool(failed) or not bool((least > _RESOLVED * most).all()):
            q, r = torch.linalg.qr(columns)
            return q, r
        found, whole = torch.linalg.solve_triangular(upper, found, upper=True, left=False), upper @ whole
    return found, whole
