"""Directions of several matrices made orthogonal to each other, as evenly as possible.

The nearest matrix with orthonormal columns to X = P·D·Wᵀ is its polar factor P·Wᵀ (Fan and Hoffman, 1955; Higham:
"Computing the polar decomposition", 1986). It favours no column, so that the order of the columns does not matter.
Where columns depend on each other the nearest one is not unique; singular vectors that D does not determine are then
left out, and P·Wᵀ is the partial isometry that has the range of X and no other direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loratools.maths.lowrank import COMPUTE, Compressed, Factors, Svd, dense_svd

# Unit vectors that differ by less than √eps of float64 are one direction: no file stores more digits than that.
_ALIKE = 2.0**-26
# Of the extreme eigenvalues of a Gram matrix: above this ratio, squaring costs at most two of float64's digits.
_INDEPENDENT = 1e-2
# Columns up to which one way is as quick as the other.
_FEW = 32


def polar(columns: torch.Tensor) -> torch.Tensor:
    """The polar factor of a matrix of unit columns.

    Args:
        columns: (n, k) float64.

    Returns:
        (n, k): orthonormal columns where those given are independent, else a partial isometry of the same range.
    """
    if columns.shape[0] <= columns.shape[1]:
        return _isometry(columns)
    if columns.shape[1] > _FEW:
        quick = _by_gram(columns)
        if quick is not None:
            return quick
    found = torch.linalg.qr(columns)
    isometry: torch.Tensor = found.Q @ _isometry(found.R)
    return isometry


def _by_gram(columns: torch.Tensor) -> torch.Tensor | None:
    """X·(XᵀX)^-½, a third of the work; None where columns are so alike that squaring would lose digits."""
    squares, vectors = torch.linalg.eigh(columns.T @ columns)
    if not bool(squares[0] > _INDEPENDENT * squares[-1]):
        return None
    isometry: torch.Tensor = columns @ (vectors * squares.rsqrt() @ vectors.T)
    return isometry


def _isometry(matrix: torch.Tensor) -> torch.Tensor:
    found = dense_svd(matrix)
    kept = int((found.sigma > _ALIKE * found.sigma[:1]).sum())
    return found.u[:, :kept] @ found.vh[:kept]


def orthogonal_sum(spectra: Sequence[Svd], level: float | None = None) -> Factors:
    """U⊥ · diag(σ) · V⊥ᵀ of the singular vectors of several matrices, each side made orthogonal across all of them.

    Args:
        spectra: Decompositions of matrices of one shape (out, in), at least one; any may be empty.
        level: One value for every σ; None to keep their own.

    Returns:
        Factors with √σ on both sides and as many columns as there are singular vectors, in the order of falling σ;
        zero factors of rank 1 where there are none.
    """
    sigma = torch.cat([found.sigma for found in spectra])
    up = torch.cat([found.u for found in spectra], dim=1)
    across = torch.cat([found.vh for found in spectra]).T
    if not sigma.numel():
        return Factors(up.new_zeros(up.shape[0], 1), across.new_zeros(1, across.shape[0]))
    order = torch.argsort(sigma, descending=True, stable=True)
    sigma, up, across = sigma[order], polar(up[:, order]), polar(across[:, order])
    root = (sigma if level is None else torch.full_like(sigma, level)).sqrt()
    return Factors(up * root, root[:, None] * across.T)


def leading(factors: Factors, rank: int) -> Compressed:
    """The first rank-one terms, for a sum whose terms are in the order of their importance.

    Args:
        factors: Float64.
        rank: How many terms are kept, a count of at least 1.

    Returns:
        The first terms as they are. The energy is 1 − ‖what is left out‖² / ‖whole‖², which is the fraction of Σσ²
        where the terms are orthogonal; sigma are the lengths of the kept terms.
    """
    kept = Factors(factors.up[:, :rank], factors.down[:rank])
    rest = Factors(factors.up[:, rank:], factors.down[rank:])
    whole, lost = _square(factors), _square(rest)
    lengths = torch.linalg.vector_norm(kept.up, dim=0) * torch.linalg.vector_norm(kept.down, dim=1)
    energy = min(1.0, max(0.0, 1.0 - lost / whole)) if whole > 0.0 else 1.0
    return Compressed(kept, energy, lengths.to(COMPUTE))


def _square(factors: Factors) -> float:
    return float(((factors.up.T @ factors.up) * (factors.down @ factors.down.T)).sum())
