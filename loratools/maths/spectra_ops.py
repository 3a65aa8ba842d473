"""Singular values of merged products, and products within the bases of all of them.

What several ΔWᵢ = upᵢ @ downᵢ span has at most Σ rankᵢ directions on either side, so whatever is a function of their
singular values and vectors can be computed there: for (out, in) matrices and R = Σ rankᵢ at the cost of QR
decompositions, (out + in)·R², and of R x R matrices. Where R reaches out or in that side is taken as it is: no basis
has fewer dimensions, and the cost is that of the full matrix, never more.

Every product is first brought to its numerical rank, with √σ on both sides. What is computed depends on the matrices
alone, not on how their factors share magnitude or on columns that cancel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from loratools.maths.leading import tall_svd
from loratools.maths.lowrank import (
    COMPUTE,
    Compressed,
    Factors,
    Svd,
    balanced,
    compress,
    numerical_rank,
    signed,
    stack,
)


class Reduced(NamedTuple):
    """Products in common orthonormal bases, as small factors: ΔWᵢ = left · partsᵢ · rightᵀ.

    Attributes:
        left: (out, p) orthonormal columns; None for all of the space, where p = out.
        right: (in, q) orthonormal columns; None for all of the space, where q = in.
        parts: Factors of (p, q) matrices.
    """

    left: torch.Tensor | None
    right: torch.Tensor | None
    parts: tuple[Factors, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q), the dimensions of the bases."""
        return self.parts[0].shape

    def expanded(self, small: Factors) -> Factors:
        """left · small · rightᵀ as factors of the full shape.

        Args:
            small: Factors of a (p, q) matrix.
        """
        up = small.up if self.left is None else self.left @ small.up
        down = small.down if self.right is None else small.down @ self.right.T
        return Factors(up, down)


def even(part: Factors, weight: float) -> Factors:
    """weight · up @ down at its numerical rank, with √(|weight|·σ) on both sides; the sign goes into up.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
    """
    return stack([compress(part).factors], [weight])


def reduced(parts: Sequence[Factors], weights: Sequence[float]) -> Reduced:
    """The products in any bases that hold them all, by QR decompositions.

    For what does not depend on the bases; :func:`reduced_aligned` is for what does.

    Args:
        parts: At least one, all of one shape (out, in).
        weights: What each product is multiplied by.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
    """
    scaled = [even(part, weight) for part, weight in zip(parts, weights, strict=True)]
    left = _basis(torch.cat([part.up for part in scaled], dim=1))
    right = _basis(torch.cat([part.down for part in scaled]).T)
    return Reduced(left, right, tuple(_within(scaled, left, right)))


def reduced_aligned(parts: Sequence[Factors], weights: Sequence[float]) -> Reduced:
    """The products in the bases of the singular vectors of all their factors together.

    Directions beyond the numerical rank are left out: they belong to no product, and counting their zeros among the
    elements would make a density depend on how many columns of the factors are redundant.

    Args:
        parts: At least one, all of one shape (out, in).
        weights: What each product is multiplied by.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
    """
    scaled = [even(part, weight) for part, weight in zip(parts, weights, strict=True)]
    left, ups = _aligned(torch.cat([part.up for part in scaled], dim=1))
    right, downs = _aligned(torch.cat([part.down for part in scaled]).T)
    ranks = [part.rank for part in scaled]
    both = zip(torch.split(ups, ranks, dim=1), torch.split(downs, ranks, dim=1), strict=True)
    return Reduced(left, right, tuple([Factors(up, down.T) for up, down in both]))


def spectrum(factors: Factors) -> Svd:
    """The singular value decomposition at the numerical rank, which is 0 for a matrix that is rounding noise.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
    """
    found = compress(factors)
    rank = found.factors.rank if bool(found.factors.up.any()) else 0
    sigma = found.sigma[:rank]
    root = sigma.sqrt()
    return Svd(found.factors.up[:, :rank] / root, sigma, found.factors.down[:rank] / root[:, None])


def flattened(found: Svd, level: float, rank: int | None = None) -> Compressed:
    """The matrix with all its singular values set to one.

    Args:
        found: Without zeros among its singular values.
        level: The singular value, of either sign.
        rank: How many directions are kept, a count: those whose own singular values were largest. None for all.

    Returns:
        Factors with √|level| on both sides.
    """
    known = int(found.sigma.numel())
    kept = known if rank is None else min(rank, known)
    sigma = torch.full_like(found.sigma, abs(level))
    sign = -1.0 if level < 0 else 1.0
    part = balanced(Svd(sign * found.u[:, :kept], sigma[:kept], found.vh[:kept]))
    return Compressed(part, kept / known if known else 1.0, sigma)


def core_size(parts: Sequence[Factors]) -> int:
    """How many singular values a combination of the products can have: min(Σ rank, out, in), a count of at least 1.

    Args:
        parts: Products at their numerical rank, of which a zero one is a zero column.
    """
    ranks = sum(int(part.up.any(dim=0).sum()) for part in parts)
    return max(1, min(ranks, *parts[0].shape))


def full_size_note(parts: Sequence[Factors]) -> str:
    """What to say where the common bases are as large as the matrix; empty where they are not."""
    ranks, most = sum(part.rank for part in parts), min(parts[0].shape)
    if ranks < most:
        return ""
    return f"the ranks add up to {ranks} of {most} that are possible: computed at the cost of the full matrix"


def _basis(columns: torch.Tensor) -> torch.Tensor | None:
    """Orthonormal columns that hold all of these; None where no fewer than all dimensions would."""
    if columns.shape[1] >= columns.shape[0]:
        return None
    basis: torch.Tensor = torch.linalg.qr(columns).Q
    return basis


def _aligned(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The left singular vectors (n, k) whose singular values are not rounding noise, and columns within them."""
    found = signed(tall_svd(columns))
    shape = (int(columns.shape[0]), int(columns.shape[1]))
    kept = max(1, numerical_rank(found.sigma, shape, COMPUTE))
    return found.u[:, :kept], found.sigma[:kept, None] * found.vh[:kept]


def _within(
    parts: Sequence[Factors], left: torch.Tensor | None, right: torch.Tensor | None
) -> Iterator[Factors]:
    """Products within bases: all factors at once, since products of a few columns each are several times slower."""
    ranks = [part.rank for part in parts]
    up = torch.cat([part.up for part in parts], dim=1)
    down = torch.cat([part.down for part in parts])
    ups = torch.split(up if left is None else left.T @ up, ranks, dim=1)
    downs = torch.split(down if right is None else down @ right, ranks)
    return (Factors(*both) for both in zip(ups, downs, strict=True))
