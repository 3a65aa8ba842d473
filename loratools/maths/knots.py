"""Products side by side in one basis: the singular value decomposition of [ΔW₁ … ΔW_T] from factors.

    [ΔW₁ … ΔW_T] = U·Σ·[V₁ᵀ … V_Tᵀ],   Pᵢ = Σ·Vᵢᵀ = Uᵀ·ΔWᵢ,   ΔWᵢ = U·Pᵢ

Stoica and others: "Model merging with SVD to tie the KnOTS", arXiv 2410.19735. Where downᵢ has orthogonal rows of
lengths ℓᵢ, the concatenation has the left singular vectors and the singular values of [upᵢ·diag(ℓᵢ) …], an (out, Σ
rank) matrix instead of an (out, T·in) one. The Pᵢ of (k, in), k ≤ min(out, Σ rank), stay factored until they are
asked for, so that no more than one of them has to exist at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from loratools.maths.leading import tall_svd
from loratools.maths.lowrank import COMPUTE, Factors, numerical_rank, signed
from loratools.maths.spectra_ops import even


class Knots(NamedTuple):
    """Products in one basis of their columns.

    Attributes:
        basis: (out, k) orthonormal, U in the order of falling singular values of the concatenation.
        parts: Factors of the (k, in) components Pᵢ.
    """

    basis: torch.Tensor
    parts: tuple[Factors, ...]


def knots(parts: Sequence[Factors], weights: Sequence[float]) -> Knots:
    """The common basis and the components of several products.

    Args:
        parts: At least one, all of one shape (out, in).
        weights: What each product is multiplied by.

    Returns:
        A basis without directions of rounding noise, of at least one. The largest entry of every basis vector is
        positive.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
    """
    scaled = [even(part, weight) for part, weight in zip(parts, weights, strict=True)]
    lengths = [torch.linalg.vector_norm(part.down, dim=1) for part in scaled]
    columns = torch.cat([part.up * length for part, length in zip(scaled, lengths, strict=True)], dim=1)
    found = signed(tall_svd(columns))
    shape = (int(columns.shape[0]), int(columns.shape[1]))
    basis = found.u[:, : max(1, numerical_rank(found.sigma, shape, COMPUTE))]
    # All at once: products of a few columns each are several times slower.
    inner = basis.T @ torch.cat([part.up for part in scaled], dim=1)
    ups = torch.split(inner, [part.rank for part in scaled], dim=1)
    return Knots(basis, tuple([Factors(up, part.down) for up, part in zip(ups, scaled, strict=True)]))
