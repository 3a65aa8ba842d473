"""The core space of several products of factors: what they are in common bases, as small matrices.

ΔWᵢ = upᵢ @ downᵢ. The QR decompositions of the stacked factors, [up₁ … up_T] = L·R_L and [down₁ᵀ … down_Tᵀ] = P·R_P,
give ΔWᵢ = L·Mᵢ·Pᵀ exactly, with cores Mᵢ = R_L[:, Iᵢ]·R_P[:, Iᵢ]ᵀ of min(out, Σrank) x min(in, Σrank). Inner
products of the matrices are those of their cores, and even those need only Gram matrices of the factors.

Panariello and others: "Accurate and efficient low-rank model merging in core space", arXiv 2509.17786, which aligns the
bases by singular value decompositions; :func:`aligned` does so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from loratools.errors import NonFiniteError
from loratools.maths.lowrank import COMPUTE, Factors, Svd, dense_svd, signed


class Core(NamedTuple):
    """Products of factors in common orthonormal bases, all in float64 on one device.

    Attributes:
        left: (out, p) orthonormal columns.
        right: (in, q) orthonormal columns.
        parts: One (p, q) matrix for each product.
    """

    left: torch.Tensor
    right: torch.Tensor
    parts: tuple[torch.Tensor, ...]

    def factors(self, core: torch.Tensor) -> Factors:
        """left · core · rightᵀ as factors of rank min(p, q), the core in the narrower side.

        Args:
            core: (p, q) float64.
        """
        if core.shape[0] <= core.shape[1]:
            return Factors(self.left, core @ self.right.T)
        return Factors(self.left @ core, self.right.T)

    def expanded(self, found: Svd) -> Factors:
        """left · u · diag(sigma) · vh · rightᵀ as factors balanced by √sigma."""
        root = found.sigma.clamp(min=0.0).sqrt()
        return Factors((self.left @ found.u) * root, root[:, None] * (found.vh @ self.right.T))


def core_of(parts: Sequence[Factors], weights: Sequence[float]) -> Core:
    """The products in common bases.

    Args:
        parts: At least one, all of one shape (out, in).
        weights: What each product is multiplied by.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
    """
    up = torch.cat([part.up.to(COMPUTE) for part in parts], dim=1)
    across = torch.cat([part.down.to(COMPUTE) for part in parts]).T
    if not bool(torch.isfinite(up.sum() + across.sum())):
        raise NonFiniteError("a factor holds NaN or Inf", expected="Finite factors were expected")
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(across)
    return Core(left, right, _cores(parts, weights, left_core, right_core))


def aligned(parts: Sequence[Factors], weights: Sequence[float]) -> Core:
    """The products in the bases that singular value decompositions of the stacked factors give.

    Element-wise work on cores depends on the bases; these do not depend on the order of the products, and the
    largest entry by magnitude of every left vector is positive. Products are stacked with their weights' and norms'
    balance: each as √|weight| · up · s and √|weight| · down / s with s = √(‖down‖ / ‖up‖).
    """
    balanced = [_balanced(part, weight) for part, weight in zip(parts, weights, strict=True)]
    signs = [-1.0 if weight < 0 else 1.0 for weight in weights]
    plain = core_of(balanced, signs)
    start = torch.cat([part.up for part in balanced], dim=1)
    across = torch.cat([part.down for part in balanced]).T
    left = _singular(plain.left, start)
    right = _singular(plain.right, across)
    turns = plain.left.T @ left, plain.right.T @ right
    return Core(left, right, tuple([turns[0].T @ core @ turns[1] for core in plain.parts]))


def _singular(basis: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The left singular vectors of columns within a basis of their span, (n, k), by descending singular value."""
    found = dense_svd(basis.T @ columns)
    return signed(Svd(basis @ found.u, found.sigma, found.vh)).u


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


def _balanced(part: Factors, weight: float) -> Factors:
    wide = part.to(COMPUTE)
    up, down = float(wide.up.norm()), float(wide.down.norm())
    shift = (down / up) ** 0.5 if up and down else 1.0
    root = abs(weight) ** 0.5
    return Factors(wide.up * (root * shift), wide.down * (root / shift))


def _cores(
    parts: Sequence[Factors], weights: Sequence[float], left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    found: list[torch.Tensor] = []
    start = 0
    for part, weight in zip(parts, weights, strict=True):
        stop = start + part.rank
        found.append(weight * (left[:, start:stop] @ right[:, start:stop].T))
        start = stop
    return tuple(found)
