"""The leading singular vectors of a matrix that is held, without those of the rest, and all of a tall one.

G = DᵀD of the smaller side has the right singular vectors as its eigenvectors; those wanted give D·V = U·Σ, which is
decomposed again and has none of the error that squaring made. What is lost in choosing V is about eps·‖D‖², so that
the full decomposition takes its place where less than 10⁻¹¹ of ‖D‖² lies beyond the rank.
"""

from __future__ import annotations

import torch

from loratools.maths._approximation import polished
from loratools.maths.lowrank import Svd, dense_svd

_SMALL = 32
_RESOLVED = 1e-11
# Squares of float64 numbers between these sum up without loss.
_SAFE_LOW, _SAFE_HIGH = 1e-270, 1e300


def leading_svd(matrix: torch.Tensor, rank: int) -> Svd:
    """The largest singular values and their vectors.

    Args:
        matrix: (out, in) float64.
        rank: How many, a count of at least 1; all where there are fewer.

    Raises:
        NonFiniteError: The matrix holds NaN or Inf.
    """
    if min(matrix.shape) > _SMALL and rank < min(matrix.shape):
        turned = matrix.shape[0] < matrix.shape[1]
        found = _by_gram(matrix.T if turned else matrix, rank)
        if found is not None:
            return Svd(found.vh.T, found.sigma, found.u.T) if turned else found
    found = dense_svd(matrix)
    return Svd(found.u[:, :rank], found.sigma[:rank], found.vh[:rank])


def _by_gram(matrix: torch.Tensor, rank: int) -> Svd | None:
    """The leading part of a matrix (out, in) with out ≥ in; None where squaring may have lost what matters."""
    gram = matrix.T @ matrix
    energy = float(gram.trace())
    # A comparison with NaN is false: what is not finite is left to the careful way, which says so.
    if not _SAFE_LOW < energy < _SAFE_HIGH:
        return None
    try:
        vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    except RuntimeError:
        # Divide and conquer gives up on rare matrices.
        return None
    found = Svd(*polished(matrix @ vectors, vectors))
    lost = energy - float(found.sigma.square().sum())
    return found if lost > _RESOLVED * energy else None


def tall_svd(columns: torch.Tensor) -> Svd:
    """The thin decomposition of a matrix by way of a triangle where it is taller than wide.

    Args:
        columns: (n, k) float64.

    Raises:
        NonFiniteError: The matrix holds NaN or Inf.
    """
    length, width = columns.shape
    if length <= width:
        return dense_svd(columns)
    packed, coefficients = torch.geqrf(columns)
    inner = dense_svd(packed[:width].triu())
    padded = inner.u.new_zeros(length, width)
    padded[:width] = inner.u
    # The reflections are applied to what is wanted of the basis, which is never made itself.
    return Svd(torch.ormqr(packed, coefficients, padded), inner.sigma, inner.vh)
