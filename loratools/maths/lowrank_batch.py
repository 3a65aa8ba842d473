"""Low-rank matrices of one shape and rank, decomposed together: what an accelerator needs to be kept busy.

The arithmetic is that of ``lowrank`` and ``spectrum``, on stacks: both factors are orthogonalised by the Cholesky
decomposition of their Gram matrices, and by Householder reflections where the columns of a matrix are close to
dependent; the small cores are decomposed. Each matrix is judged by itself, and its result is that of
``lowrank.compress`` to float64's rounding, whichever others share its stack.

On a GPU, cuSOLVER decomposes matrices up to 32 x 32 side by side (NVIDIA, cuSOLVER API reference, ``gesvdjBatched``)
and larger ones one after the other, each on a fraction of the device. Those cores, rank² numbers of each matrix, are
decomposed by the processor, where the threads of other batches are at work meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from loratools.errors import NonFiniteError, ShapeError
from loratools.maths._cholesky import LEAST_PIVOT, ORTHONORMAL
from loratools.maths.lowrank import (
    CANCELLATION,
    COMPUTE,
    Compressed,
    Factors,
    Svd,
    balanced,
    check_rank,
    dense_svd,
    numerical_rank,
    retained,
)
from loratools.maths.spectrum import Values

# The largest matrices that cuSOLVER decomposes side by side.
_SIDE_BY_SIDE = 32


class Stack(NamedTuple):
    """Matrices up[i] @ down[i].

    Attributes:
        up: (n, out, rank).
        down: (n, rank, in), of the same dtype on the same device.
    """

    up: torch.Tensor
    down: torch.Tensor

    def wide(self) -> Stack:
        """In float64."""
        return Stack(self.up.to(COMPUTE), self.down.to(COMPUTE))

    def some(self, chosen: Sequence[int]) -> Stack:
        """Those of given positions; without a copy where these are all."""
        if len(chosen) == len(self.up):
            return self
        return Stack(self.up[list(chosen)], self.down[list(chosen)])

    @property
    def rank(self) -> int:
        """The number of rank-one terms of each, a count."""
        return int(self.up.shape[2])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each."""
        return int(self.up.shape[1]), int(self.down.shape[2])


def stacked(batch: Sequence[Sequence[Factors]], weights: Sequence[Sequence[float]]) -> Stack:
    """Σⱼ weightᵢⱼ · upᵢⱼ @ downᵢⱼ for every i, as pairs of factors of the summed rank; see ``lowrank.stack``.

    Args:
        batch: For every sum its parts; the j-th parts of all sums are of one shape and rank.
        weights: One per part.

    Raises:
        ShapeError: The sums are not alike.
    """
    alike = {tuple((part.shape, part.rank) for part in parts) for parts in batch}
    if len(alike) != 1:
        raise ShapeError(
            f"sums of {len(alike)} different make-ups cannot be added up together",
            expected="Parts of the same shapes and ranks in the same order were expected",
        )
    ups, downs = [], []
    for parts, factors in zip(zip(*batch, strict=True), zip(*weights, strict=True), strict=True):
        weight = torch.tensor(factors, dtype=COMPUTE).to(parts[0].up.device)[:, None, None]
        root = weight.abs().sqrt()
        ups.append(torch.stack([part.up for part in parts]).to(COMPUTE) * root.copysign(weight))
        downs.append(torch.stack([part.down for part in parts]).to(COMPUTE) * root)
    return Stack(torch.cat(ups, dim=2), torch.cat(downs, dim=1))


def compress_batch(stack: Stack, ranks: Sequence[int | None]) -> list[Compressed]:
    """``lowrank.compress`` of every matrix.

    Args:
        stack: At least one matrix.
        ranks: For each a count of at least 1, or None to drop only what is rounding noise.

    Returns:
        Factors on the device of the stack, singular values on the CPU.

    Raises:
        NonFiniteError: A factor of any of them holds NaN or Inf.
        OptionError: A rank is below 1.
    """
    for rank in ranks:
        check_rank(rank)
    wide = stack.wide()
    found = _by_gram(wide, ranks)
    left = [index for index in range(len(ranks)) if index not in found]
    if left:
        careful = _by_reflections(wide.some(left), [ranks[index] for index in left])
        found |= dict(zip(left, careful, strict=True))
    return [found[index] for index in range(len(ranks))]


def singular_values_batch(stack: Stack) -> list[Values]:
    """``spectrum.singular_values`` of every matrix, on the CPU.

    Raises:
        NonFiniteError: A factor of any of them holds NaN or Inf.
    """
    wide = stack.wide()
    found: dict[int, Values] = {}
    left, right, good = _triangles(wide)
    if good:
        values = _values(left @ right.mT, wide.some(good))
        # Values that vanish are beyond what Gram matrices resolve.
        found = {index: each for index, each in zip(good, values, strict=True) if each.real == stack.rank}
    others = [index for index in range(len(wide.up)) if index not in found]
    if others:
        rest = wide.some(others)
        cores = _triangle(rest.up) @ _triangle(rest.down.mT).mT
        found |= dict(zip(others, _values(cores, rest), strict=True))
    return [found[index] for index in range(len(wide.up))]


def _values(cores: torch.Tensor, stack: Stack) -> list[Values]:
    values = _decomposed(cores).sigma.cpu()
    return [
        Values(sigma, numerical_rank(sigma, stack.shape, COMPUTE, noise))
        for sigma, noise in zip(values, _cancellations(stack), strict=True)
    ]


def _by_gram(stack: Stack, ranks: Sequence[int | None]) -> dict[int, Compressed]:
    """The results of those matrices that Gram matrices are accurate enough for, by position."""
    left, right, good = _triangles(stack)
    if not good:
        return {}
    chosen = stack.some(good)
    wanted = [min(ranks[index] or stack.rank, stack.rank) for index in good]
    found, most = _decomposed(left @ right.mT), max(wanted)
    inner = torch.linalg.solve_triangular(left, found.u[:, :, :most], upper=True)
    outer = torch.linalg.solve_triangular(right, found.vh.mT[:, :, :most], upper=True)
    u, v = chosen.up @ inner, chosen.down.mT @ outer
    sigma = found.sigma.cpu()
    real = [numerical_rank(each, stack.shape, COMPUTE) for each in sigma]
    # Values that vanish, or vectors that are not orthonormal, are beyond what Gram matrices resolve.
    exact = (_orthonormal(u, wanted) & _orthonormal(v, wanted)).tolist()
    results = _results(Svd(u, sigma, v.mT), wanted, real)
    checked = zip(good, results, exact, real, wanted, strict=True)
    return {index: result for index, result, fine, full, kept in checked if fine and full >= kept}


def _triangles(stack: Stack) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """R of up and of downᵀ, where Cholesky's decomposition gives it, (…, rank, rank); and the matrices' positions."""
    if min(stack.shape) <= stack.rank:
        return stack.up[:0], stack.down[:0], []
    left, well = _cholesky(stack.up)
    right, good = _cholesky(stack.down.mT)
    both = (well & good).nonzero().flatten().tolist()
    return (left, right, both) if len(both) == len(left) else (left[both], right[both], both)


def _cholesky(factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R (n, rank, rank) of factors (n, length, rank), and which of them it can be relied on for (n,)."""
    gram = factors.mT @ factors
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
    # Where a column is zero the quotient is NaN, to which every comparison is false.
    lower, failed = torch.linalg.cholesky_ex(gram / (lengths[:, :, None] * lengths[:, None]))
    pivots = lower.diagonal(dim1=1, dim2=2).amin(dim=1)
    return lower.mT * lengths[:, None], (failed == 0) & (pivots > LEAST_PIVOT)


def _orthonormal(columns: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Which of (n, length, k) have orthonormal columns to float64's rounding, as many as count; (n,) bool."""
    count = torch.tensor(counts).to(columns.device)
    beyond = torch.arange(columns.shape[2], device=columns.device) >= count[:, None]
    gram = columns.mT @ columns
    gram.diagonal(dim1=1, dim2=2).sub_(1.0)
    deviation = gram.abs().masked_fill(beyond[:, None] | beyond[:, :, None], 0.0)
    return deviation.amax(dim=(1, 2)) <= ORTHONORMAL * count


def _by_reflections(stack: Stack, ranks: Sequence[int | None]) -> list[Compressed]:
    left, right = _reflected(stack.up), _reflected(stack.down.mT)
    found = _decomposed(left[1] @ right[1].mT)
    sigma = found.sigma.cpu()
    real = [
        numerical_rank(each, stack.shape, COMPUTE, noise)
        for each, noise in zip(sigma, _cancellations(stack), strict=True)
    ]
    kept = [full if rank is None else min(rank, full) for full, rank in zip(real, ranks, strict=True)]
    most = max(kept)
    u, v = found.u[:, :, :most], found.vh.mT[:, :, :most]
    u, v = (basis if q is None else q @ basis for (q, _), basis in ((left, u), (right, v)))
    return _results(Svd(u, sigma, v.mT), kept, real)


def _cancellations(stack: Stack) -> list[float]:
    """``lowrank.cancellation`` of every matrix."""
    lengths, widths = stack.up.norm(dim=1), stack.down.norm(dim=2)
    found: list[float] = ((lengths * widths).sum(dim=1) * torch.finfo(COMPUTE).eps * CANCELLATION).tolist()
    return found


def _reflected(factors: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Q and R of factors (n, length, rank); no Q where they are no taller than wide, and their own core."""
    if factors.shape[1] <= factors.shape[2]:
        return None, factors
    q, r = torch.linalg.qr(factors)
    return q, r


def _triangle(factors: torch.Tensor) -> torch.Tensor:
    """R alone, likewise."""
    return factors if factors.shape[1] <= factors.shape[2] else torch.linalg.qr(factors, mode="r").R


def _decomposed(cores: torch.Tensor) -> Svd:
    """The thin decompositions of small matrices (n, p, q), where the cores lie.

    Raises:
        NonFiniteError: One of them holds NaN or Inf.
    """
    small = max(cores.shape[1:]) <= _SIDE_BY_SIDE
    near = cores if small or cores.device.type != "cuda" else cores.cpu()
    if not bool(near.isfinite().all()):
        raise NonFiniteError(
            f"one of {len(near)} matrices of shape {list(near.shape[1:])} holds NaN or Inf",
            expected="Finite factors were expected",
        )
    try:
        found = Svd(*torch.linalg.svd(near, full_matrices=False))
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        # torch's LinAlgError: one that does not converge in the stack has other ways by itself.
        single = [dense_svd(each) for each in near]
        found = Svd(*(torch.stack([getattr(each, name) for each in single]) for name in ("u", "sigma", "vh")))
    return Svd(found.u.to(cores.device), found.sigma, found.vh.to(cores.device))


def _results(found: Svd, kept: Sequence[int], real: Sequence[int]) -> list[Compressed]:
    """The approximations of given ranks, one by one; singular values are on the CPU, vectors where they were."""
    root = found.sigma[:, : found.u.shape[2]].sqrt().to(found.u.device)
    vectors = _signed(found)
    up, down = vectors.u * root[:, None], root[:, :, None] * vectors.vh
    results = []
    for index, (count, full) in enumerate(zip(kept, real, strict=True)):
        sigma = found.sigma[index]
        part = Factors(up[index, :, :count], down[index, :count])
        if not count:
            part = balanced(Svd(vectors.u[index, :, :0], sigma[:0], vectors.vh[index, :0]))
        energy = 1.0 if count == full else retained(sigma, count)
        results.append(Compressed(part, energy, sigma))
    return results


def _signed(found: Svd) -> Svd:
    """The same vectors with the largest entry by magnitude of every column of u positive."""
    if not found.u.numel():
        return found
    largest = found.u.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(found.u.gather(1, largest) < 0, -1.0, 1.0).to(found.u)
    return Svd(found.u * sign, found.sigma, found.vh * sign.mT)
