"""How low-rank matrices relate, from their factors: inner products, differences, spaces they share, signs.

⟨ΔWᵢ, ΔWⱼ⟩ = Σ (upᵢᵀupⱼ) ∘ (downᵢdownⱼᵀ) needs Gram matrices of the factors alone. The angles between the column
spaces of two matrices are those of Björck and Golub ("Numerical methods for computing angles between linear
subspaces", Math. Comp. 27, 1973): with orthonormal bases U and V, their cosines are the singular values of UᵀV. Small
angles come from their sines, as Knyazev and Argentati advise (SIAM J. Sci. Comput. 23, 2002), since a cosine near 1
knows an angle to half its digits only. All arithmetic is float64 on the device where the factors lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from loratools.maths.draws import key_of, uniform
from loratools.maths.lowrank import COMPUTE, Factors, compress, stack

# Columns that are widened to float64 and multiplied at a time.
_BLOCK = 512


class Space(NamedTuple):
    """Orthonormal bases of what a matrix reads and writes.

    Attributes:
        columns: (out, k) float64, of its column space.
        rows: (in, k) float64, of its row space.
        sigma: (k,) float64, its singular values above rounding, descending; none for a zero matrix.
    """

    columns: torch.Tensor
    rows: torch.Tensor
    sigma: torch.Tensor

    @property
    def rank(self) -> int:
        """The matrix's numerical rank, a count."""
        return len(self.sigma)

    @property
    def factors(self) -> Factors:
        """The matrix, as factors without what was rounding; of rank 1 where it is zero."""
        if not self.rank:
            return Factors(
                self.columns.new_zeros(len(self.columns), 1), self.rows.new_zeros(1, len(self.rows))
            )
        root = self.sigma.sqrt()
        return Factors(self.columns * root, root[:, None] * self.rows.T)


def space_of(factors: Factors) -> Space:
    """The column and row space of up @ down, from factors of any rank, dependent ones and ones that cancel too.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
    """
    found = compress(factors)
    kept = found.factors.rank if bool(found.factors.up.any()) else 0
    sigma = found.sigma[:kept]
    root = sigma.sqrt()
    return Space(found.factors.up[:, :kept] / root, found.factors.down[:kept].T / root, sigma)


def gram(parts: Sequence[Factors], scales: Sequence[float]) -> torch.Tensor:
    """⟨ΔWᵢ, ΔWⱼ⟩ for all pairs, with factors stacked and multiplied a block at a time.

    Only two blocks of about 512 columns are in float64 at once, however many matrices there are; what grows with the
    square of their number is products of (rank, rank).

    Args:
        parts: Any number, all of one shape (out, in) on one device, in any dtype.
        scales: What each product is multiplied by.

    Returns:
        (n, n) float64 on the CPU, symmetric. Where the terms of one product cancel, it is exact to half the digits.
    """
    count = len(parts)
    found = torch.zeros(count, count, dtype=COMPUTE, device="cpu")
    blocks = _blocks([part.rank for part in parts])
    for number, rows in enumerate(blocks):
        one = _stacked(parts, rows)
        for columns in blocks[number:]:
            other = one if columns is rows else _stacked(parts, columns)
            products = (one.up.T @ other.up) * (one.down @ other.down.T)
            sums = _summed(products, [parts[i].rank for i in rows], [parts[i].rank for i in columns])
            found[rows.start : rows.stop, columns.start : columns.stop] = sums
            found[columns.start : columns.stop, rows.start : rows.stop] = sums.T
    weights = torch.tensor(list(scales), dtype=COMPUTE, device="cpu")
    # Within a block, sums over transposed tiles are rounded in another order.
    return (found + found.T) / 2.0 * torch.outer(weights, weights)


def difference(one: Factors, other: Factors, scales: tuple[float, float] = (1.0, 1.0)) -> float:
    """‖s₁·ΔW₁ − s₂·ΔW₂‖_F without cancellation, for matrices that are nearly or exactly the same.

    ‖a‖² + ‖b‖² − 2⟨a, b⟩ loses half the digits there. The stacked factors are orthogonalised instead, and the norm is
    that of the small core, which is exact to a few units in the last place of the factors' products.
    """
    both = stack([one, other], [scales[0], -scales[1]])
    left = torch.linalg.qr(both.up, mode="r").R
    right = torch.linalg.qr(both.down.T, mode="r").R
    return float(torch.linalg.matrix_norm(left @ right.T))


def principal_angles(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The principal angles between the spans of two sets of orthonormal columns.

    Args:
        one: (n, p) float64.
        other: (n, q) float64.

    Returns:
        (min(p, q),) float64 radians in [0, π/2], ascending.
    """
    if one.shape[1] < other.shape[1]:
        one, other = other, one
    shared = one.T @ other
    # Columns of `other` turned so that each has its own angle to the larger span: cosines and sines then agree.
    _, cosines, turn = torch.linalg.svd(shared, full_matrices=False)
    turned = other @ turn.T
    sines = torch.linalg.vector_norm(turned - one @ (one.T @ turned), dim=0)
    return torch.atan2(sines, cosines.clamp(min=0.0)).sort().values


def overlap(angles: torch.Tensor) -> float | None:
    """The mean squared cosine of principal angles: 1 where the smaller space lies in the larger, 0 if orthogonal.

    Returns:
        None where there are no angles, since one of the spaces is empty.
    """
    return float(angles.cos().square().mean()) if len(angles) else None


def chance_overlap(ranks: tuple[int, int], dimension: int) -> float:
    """The overlap to be expected of two random spaces.

    For independent uniformly random spaces of p and q dimensions in n, E‖UᵀV‖_F² = p·q/n, so that the mean over the
    smaller is max(p, q)/n.
    """
    return min(1.0, max(ranks) / max(1, dimension))


class Signs(NamedTuple):
    """Sums over elements of two matrices, of |aᵢⱼ·bᵢⱼ|.

    Attributes:
        opposite: Over those of opposite signs.
        total: Over all.
    """

    opposite: float
    total: float


def sign_sums(tiles: Sequence[torch.Tensor]) -> dict[tuple[int, int], Signs]:
    """The sums for every pair of matrices, from the same rows of each, (rows, in) float64."""
    found: dict[tuple[int, int], Signs] = {}
    for second, tile in enumerate(tiles):
        for first, other in enumerate(tiles[:second]):
            products = other * tile
            plain, total = float(products.sum()), float(products.abs().sum())
            found[first, second] = Signs(max(0.0, (total - plain) / 2.0), total)
    return found


def sampled_rows(name: str, rows: int, count: int) -> torch.Tensor:
    """Which rows of a matrix stand for all of it: the same for one name on every machine.

    Args:
        name: The module's.
        rows: How many there are.
        count: How many are wanted; all where there are no more.

    Returns:
        Ascending row numbers, int64 on the CPU.
    """
    if rows <= count:
        return torch.arange(rows, device="cpu")
    order = uniform(key_of(0, "rows", name), 0, (rows, 1)).flatten().argsort(stable=True)
    return order[:count].sort().values


def _blocks(ranks: Sequence[int]) -> list[range]:
    """Neighbours whose ranks add up to a block, one matrix at least."""
    found: list[range] = []
    start = width = 0
    for index, rank in enumerate(ranks):
        if index > start and width + rank > _BLOCK:
            found.append(range(start, index))
            start, width = index, 0
        width += rank
    return [*found, range(start, len(ranks))] if ranks else []


def _stacked(parts: Sequence[Factors], indices: range) -> Factors:
    up = torch.cat([parts[index].up.to(COMPUTE) for index in indices], dim=1)
    return Factors(up, torch.cat([parts[index].down.to(COMPUTE) for index in indices]))


def _summed(products: torch.Tensor, heights: Sequence[int], widths: Sequence[int]) -> torch.Tensor:
    """The sum of every tile of a matrix whose tiles have these heights and widths, on the CPU."""
    rows = torch.stack([strip.sum(dim=0) for strip in torch.split(products, list(heights))])
    return torch.stack([strip.sum(dim=1) for strip in torch.split(rows, list(widths), dim=1)], dim=1).cpu()
