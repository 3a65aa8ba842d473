"""The singular values of a matrix that is given as a pair of factors, without its singular vectors.

up = Q·R and downᵀ = P·S give those of up @ down as the singular values of R·Sᵀ, and neither Q nor P is needed. R and S
come from Gram matrices where the factors' columns are far from dependent (``_cholesky``), else from Householder
reflections. Vectors cost more than all the rest: of two factors of rank 64, the values alone take a third of the time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from loratools.errors import NonFiniteError
from loratools.maths._cholesky import orthogonalise
from loratools.maths.lowrank import COMPUTE, Factors, cancellation, dense_svd, numerical_rank


class Values(NamedTuple):
    """What ``lowrank.compress`` finds of a matrix, without its factors.

    Attributes:
        sigma: (k,) float64, descending, k = min(rank, out, in).
        real: How many of them are more than rounding, a count; 0 for a zero matrix.
    """

    sigma: torch.Tensor
    real: int


def singular_values(factors: Factors) -> Values:
    """All singular values of up @ down, the same as of its decomposition to 1e-12 of the largest.

    Args:
        factors: Of any rank and floating dtype; computed in float64 where they lie.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
    """
    wide = factors.to(COMPUTE)
    noise = cancellation(wide)
    left, right = orthogonalise(wide.up), orthogonalise(wide.down.T)
    if left is not None and right is not None:
        found = _values(left.core @ right.core.T, factors, noise)
        # Values that vanish are beyond what Gram matrices resolve.
        if found.real == factors.rank:
            return found
    return _values(_triangle(wide.up) @ _triangle(wide.down.T).T, factors, noise)


def _values(core: torch.Tensor, factors: Factors, noise: float) -> Values:
    if not bool(core.isfinite().all()):
        raise NonFiniteError(
            f"factors of shape {list(factors.shape)} hold NaN or Inf", expected="Finite factors were expected"
        )
    try:
        sigma = torch.linalg.svdvals(core)
    except RuntimeError:
        # LAPACK's gesdd gives up on rare matrices, which the decomposition has another way for.
        sigma = dense_svd(core).sigma
    return Values(sigma, numerical_rank(sigma, factors.shape, COMPUTE, noise))


def _triangle(factor: torch.Tensor) -> torch.Tensor:
    """R of x = Q·R, (min(n, rank), rank); x itself where it is no taller than wide."""
    if factor.shape[0] <= factor.shape[1]:
        return factor
    found: torch.Tensor = torch.linalg.qr(factor, mode="r").R
    return found
