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
# Elements of matrices that are made and multiplied at a time: 32 MiB of float64.
_ELEMENTS = 2**22


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
    """⟨ΔWᵢ, ΔWⱼ⟩ for all pairs, from the factors or, where these have so many columns that it costs less, from ΔW.

    With R = Σ ranks, the factors' products cost R²·(out + in) operations, halved by symmetry. Those of n matrices
    themselves cost n²·out·in, and R·out·in to make them, which is less for many adapters of high ranks. Only two blocks
    of about 512 columns, or a few rows of every ΔW, are in float64 at once, however many matrices there are.

    Args:
        parts: Any number, all of one shape (out, in) on one device, in any dtype.
        scales: What each product is multiplied by.

    Returns:
        (n, n) float64 on the CPU, symmetric. Where the terms of one product cancel, it is exact to half the digits.
    """
    if not parts:
        return torch.zeros(0, 0, dtype=COMPUTE, device="cpu")
    (height, width), ranks = parts[0].shape, sum(part.rank for part in parts)
    whole = height * width * (len(parts) ** 2 + ranks)
    found = _of_rows(parts) if whole < ranks**2 * (height + width) / 2 else _of_factors(parts)
    weights = torch.tensor(list(scales), dtype=COMPUTE, device="cpu")
    # Sums over transposed tiles are rounded in another order.
    return (found + found.T) / 2.0 * torch.outer(weights, weights)


def _of_factors(parts: Sequence[Factors]) -> torch.Tensor:
    """Inner products from (rank, rank) products of the factors, which are stacked a block at a time."""
    found = torch.zeros(len(parts), len(parts), dtype=COMPUTE, device="cpu")
    blocks = _blocks([part.rank for part in parts])
    for number, rows in enumerate(blocks):
        one = _stacked(parts, rows)
        for columns in blocks[number:]:
            other = one if columns is rows else _stacked(parts, columns)
            products = (one.up.T @ other.up).mul_(one.down @ other.down.T)
            sums = _summed(products, [parts[i].rank for i in rows], [parts[i].rank for i in columns])
            found[rows.start : rows.stop, columns.start : columns.stop] = sums
            found[columns.start : columns.stop, rows.start : rows.stop] = sums.T
    return found


def _of_rows(parts: Sequence[Factors]) -> torch.Tensor:
    """Inner products of the matrices themselves, of which a few rows are made at a time."""
    height, width = parts[0].shape
    step = max(1, _ELEMENTS // (len(parts) * width))
    found = parts[0].up.new_zeros(len(parts), len(parts), dtype=COMPUTE)
    rows = parts[0].up.new_empty(len(parts), step, width, dtype=COMPUTE)
    for start in range(0, height, step):
        for own, part in zip(rows, parts, strict=True):
            up = part.up[start : start + step].to(COMPUTE)
            torch.matmul(up, part.down.to(COMPUTE), out=own[: len(up)])
        flat = rows[:, : min(step, height - start)].flatten(1)
        found += flat @ flat.T
    return found.cpu()


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


def shared_squares(bases: Sequence[torch.Tensor]) -> torch.Tensor:
    """‖UᵢᵀUⱼ‖_F² for all pairs: the sum of the squared cosines of their principal angles, which need not be known.

    Divided by the smaller number of columns, it is how much two spaces overlap: 1 where the smaller one lies in the
    larger, 0 where they are orthogonal, and p·q / (n · min(p, q)) on average for independent uniformly random spaces of
    p and q dimensions in n, since E‖UᵀV‖_F² = p·q/n.

    Args:
        bases: (n, pᵢ) float64 each, with orthonormal columns, none where the space is empty.

    Returns:
        (count, count) float64 on the CPU.
    """
    stacked = torch.cat(list(bases), dim=1)
    widths = [basis.shape[1] for basis in bases]
    return _summed((stacked.T @ stacked).square_(), widths, widths)


class Signs(NamedTuple):
    """Sums over elements of two matrices, of |aᵢⱼ·bᵢⱼ|, for all pairs of several matrices.

    Attributes:
        opposite: (n, n) float64 on the CPU, over those of opposite signs.
        total: Likewise, over all.
    """

    opposite: torch.Tensor
    total: torch.Tensor


def sign_sums(tiles: Sequence[torch.Tensor]) -> Signs:
    """The sums for every pair of matrices, from the same rows of each, (rows, in) float64."""
    flat = torch.stack([tile.flatten() for tile in tiles])
    plain = flat @ flat.T
    flat.abs_()
    total = flat @ flat.T
    return Signs(((total - plain) / 2.0).clamp_(min=0.0).cpu(), total.cpu())


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
    (height, width), ranks = parts[0].shape, [parts[index].rank for index in indices]
    up = parts[0].up.new_empty(height, sum(ranks), dtype=COMPUTE)
    down = parts[0].down.new_empty(sum(ranks), width, dtype=COMPUTE)
    # Widened in their places: a list of wide copies would take as much again.
    places = zip(torch.split(up, ranks, dim=1), torch.split(down, ranks), strict=True)
    for index, (left, right) in zip(indices, places, strict=True):
        left.copy_(parts[index].up)
        right.copy_(parts[index].down)
    return Factors(up, down)


def _summed(products: torch.Tensor, heights: Sequence[int], widths: Sequence[int]) -> torch.Tensor:
    """The sum of every tile of a matrix whose tiles have these heights and widths, on the CPU."""
    rows = torch.stack([strip.sum(dim=0) for strip in torch.split(products, list(heights))])
    return torch.stack([strip.sum(dim=1) for strip in torch.split(rows, list(widths), dim=1)], dim=1).cpu()
