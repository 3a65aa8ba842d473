"""Many low-rank matrices in one basis: ΔW_t ≈ U·Σ_t·V, with U and V for all, and a small core Σ_t for each.

R. Brüel-Gabrielsson et al., "Compress then Serve: Serving Thousands of LoRA Adapters with Little Overhead" (ICML 2025,
arXiv 2407.00066). With full cores (the paper's JD-Full), U (out, R) and V (R, in) are orthonormal, Σ_t = Uᵀ·ΔW_t·Vᵀ is
the best core, and what is minimised, Σ ‖ΔW_t − U·Σ_t·V‖², is least where Σ ‖Uᵀ·ΔW_t·Vᵀ‖² is largest: for a fixed V,
at the leading left space of [ΔW_1·Vᵀ, ΔW_2·Vᵀ, …], and so in turn. With diagonal ones (JD-Diag) U and V are not
orthonormal, and U, V and the cores each have a least-squares problem whose normal equations are R × R.

Each ΔW_t is divided by its norm first, so that relative errors count alike; the cores returned have the norm again.
ΔW_t is never made: C_t with C_t·C_tᵀ = ΔW_t·P·ΔW_tᵀ has as many columns as ΔW_t has ranks. Where the stacked C are
small, their leading space is taken exactly; else by steps of orthogonal iteration from the space at hand,
U ← qr(C·Cᵀ·U), none of which lowers what is maximised, since tr(UᵀPU) is convex in U for a semidefinite P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from loratools.errors import OptionError, ShapeError
from loratools.maths.leading import leading_svd
from loratools.maths.lowrank import COMPUTE, Factors

# Up to this smaller side, in elements, the stacked columns are decomposed as they are.
_EXACT = 1024
# Steps of orthogonal iteration in place of one decomposition.
_STEPS = 2
_ROUNDS = 100
# Rounds end when Σ ‖ΔW_t − U·Σ_t·V‖² / ‖ΔW_t‖² falls by less than this part of the number of matrices.
_TOLERANCE = 1e-6
# Directions of the normal equations below this part of the largest are left out.
_SINGULAR = 1e-13


class SharedBasis(NamedTuple):
    """Matrices in one basis.

    Attributes:
        left: U, (out, R) float64; R as ``widths`` has it, which may be fewer than asked for.
        right: V, (R', in) float64; R' likewise.
        cores: Σ_t, (n, R, R') float64, or (n, R) where they are diagonal.
        norms: ‖ΔW_t‖_F, (n,) float64.
        errors: ‖ΔW_t − U·Σ_t·V‖_F / ‖ΔW_t‖_F, (n,) float64; 0 for a zero matrix.
        rounds: Of the alternation, a count.
        objective: Σ errors² after each round, which never rises.
    """

    left: torch.Tensor
    right: torch.Tensor
    cores: torch.Tensor
    norms: torch.Tensor
    errors: torch.Tensor
    rounds: int
    objective: tuple[float, ...]


def shared_basis(parts: Sequence[Factors], rank: int, *, diagonal: bool = False) -> SharedBasis:
    """One basis for many matrices, and a core for each.

    Args:
        parts: At least one, all of one shape (out, in), of any ranks, scales folded in.
        rank: Of U and of V, a count of at least 1; see ``widths``.
        diagonal: Whether the cores are diagonal.

    Raises:
        OptionError: The rank is below 1, or there are no matrices.
        ShapeError: The matrices have different shapes.
    """
    if rank < 1 or not parts:
        raise OptionError(
            f"a shared basis of rank {rank} for {len(parts)} matrices",
            expected="A rank of at least 1 and at least one matrix were expected",
        )
    if len({part.shape for part in parts}) > 1:
        raise ShapeError(
            f"matrices of shapes {sorted({part.shape for part in parts})} have no basis in common"
        )
    norms = torch.tensor([_norm(part) for part in parts], dtype=COMPUTE)
    units = [
        Factors(part.up.to(COMPUTE) / (norm or 1.0), part.down.to(COMPUTE))
        for part, norm in zip(parts, norms.tolist(), strict=True)
    ]
    counts = widths(parts[0].shape, sum(part.rank for part in parts), rank, diagonal=diagonal)
    squares = (norms > 0).to(COMPUTE)
    found = _diagonal(units, squares, counts[0]) if diagonal else _full(units, squares, counts)
    sizes = norms.reshape(-1, *(1 for _ in found.cores.shape[1:]))
    return found._replace(cores=found.cores * sizes, norms=norms)


def widths(shape: tuple[int, int], total: int, rank: int, *, diagonal: bool = False) -> tuple[int, int]:
    """How many columns U and how many rows V have, counts: no more than could be used.

    Args:
        shape: (out, in).
        total: The ranks of all matrices together, a count.
        rank: What is asked for, a count.
        diagonal: Whether the cores are diagonal, which takes as many of both.
    """
    most = min(rank, total)
    return (most, most) if diagonal else (min(most, shape[0]), min(most, shape[1]))


def _norm(part: Factors) -> float:
    left, right = (
        torch.linalg.qr(part.up.to(COMPUTE), mode="r").R,
        torch.linalg.qr(part.down.to(COMPUTE).T, mode="r").R,
    )
    return float(torch.linalg.matrix_norm(left @ right.T))


class _Alike(NamedTuple):
    """Matrices of one rank, which are computed with together.

    Attributes:
        places: Where each stands among all.
        up: (n, out, rank).
        down: (n, rank, in).
    """

    places: list[int]
    up: torch.Tensor
    down: torch.Tensor


def _alike(units: Sequence[Factors]) -> list[_Alike]:
    """Matrices by their rank."""
    places: dict[int, list[int]] = {}
    for place, unit in enumerate(units):
        places.setdefault(unit.rank, []).append(place)
    return [
        _Alike(
            own,
            torch.stack([units[place].up for place in own]),
            torch.stack([units[place].down for place in own]),
        )
        for own in places.values()
    ]


def _full(units: Sequence[Factors], squares: torch.Tensor, counts: tuple[int, int]) -> SharedBasis:
    """U and V in turn, from the leading spaces of all columns and of all rows."""
    groups = _alike(units)
    left = _space([_columns(each.up, each.down) for each in groups], counts[0], None)
    right = _space([_columns(each.down.mT, each.up.mT) for each in groups], counts[1], None)
    kept = [_kept(groups, left, right)]
    while len(kept) <= _ROUNDS:
        left = _space([_columns(each.up, each.down @ right) for each in groups], counts[0], left)
        right = _space([_columns(each.down.mT, each.up.mT @ left) for each in groups], counts[1], right)
        kept.append(_kept(groups, left, right))
        if kept[-1] - kept[-2] <= _TOLERANCE * len(units):
            break
    cores = left.new_zeros(len(units), left.shape[1], right.shape[1])
    for each in groups:
        cores[each.places] = _cores(each, left, right)
    errors = (squares - cores.square().sum((1, 2))).clamp(min=0.0).sqrt()
    total = float(squares.sum())
    objective = tuple(max(0.0, total - each) for each in kept)
    return SharedBasis(left, right.T, cores, squares, errors, len(kept) - 1, objective)


def _columns(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """All columns C_t (out, n·k) with C_t·C_tᵀ = outer·inner·innerᵀ·outerᵀ, each of no more columns than the rank.

    Args:
        outer: (n, out, rank).
        inner: (n, rank, k).
    """
    if inner.shape[2] > outer.shape[2]:
        inner = torch.linalg.qr(inner.mT, mode="r").R.mT
    return (outer @ inner).transpose(0, 1).flatten(1)


def _cores(given: _Alike, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left.T @ given.up) @ (given.down @ right)


def _kept(groups: Sequence[_Alike], left: torch.Tensor, right: torch.Tensor) -> float:
    return sum(float(_cores(each, left, right).square().sum()) for each in groups)


def _space(parts: Sequence[torch.Tensor], count: int, start: torch.Tensor | None) -> torch.Tensor:
    """Orthonormal columns of the leading space of the columns of all parts, (length, count)."""
    length, total = len(parts[0]), sum(part.shape[1] for part in parts)
    if min(length, total) <= _EXACT:
        columns = torch.cat(list(parts), dim=1)
        if total > length:  # the right side is not wanted, and is the long one
            columns = torch.linalg.qr(columns.T, mode="r").R.T
        found = leading_svd(columns, count).u
        return found if found.shape[1] == count else _orthonormal(found, count)
    if start is None:
        generator = torch.Generator().manual_seed(length)
        start = torch.randn(length, count, generator=generator, dtype=COMPUTE)
        steps = 4 * _STEPS
    else:
        steps = _STEPS
    for _ in range(steps):
        image = torch.zeros_like(start)
        for part in parts:
            image += part @ (part.T @ start)
        start = _orthonormal(image, count)
    return start


def _orthonormal(columns: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` orthonormal columns, the first of which span those that are given."""
    length, own = columns.shape
    generator = torch.Generator().manual_seed(length)
    more = torch.randn(length, count - own, generator=generator, dtype=COMPUTE)
    basis: torch.Tensor = torch.linalg.qr(torch.cat([columns, more], dim=1)).Q
    return basis


def _diagonal(units: Sequence[Factors], squares: torch.Tensor, count: int) -> SharedBasis:
    """Cores, U and V in turn, each by least squares."""
    left, right = _started(units, count)
    cores = _diagonal_cores(units, left, right)
    lost = [_lost(units, squares, left, right, cores)]
    while len(lost) <= _ROUNDS:
        before = left, right, cores
        left = _solved(_weighted(units, right, cores, lambda unit: (unit.up, unit.down)), right, cores)
        right = _solved(_weighted(units, left, cores, lambda unit: (unit.down.T, unit.up.T)), left, cores)
        cores = _diagonal_cores(units, left, right)
        now = _lost(units, squares, left, right, cores)
        if float(now.sum()) > float(lost[-1].sum()):  # rounding alone is left
            left, right, cores = before
            break
        lost.append(now)
        if float((lost[-2] - now).sum()) <= _TOLERANCE * len(units):
            break
    objective = tuple(float(each.sum()) for each in lost)
    return SharedBasis(left, right.T, cores, squares, lost[-1].sqrt(), len(lost) - 1, objective)


def _started(units: Sequence[Factors], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U (out, R) and Vᵀ (in, R) to begin with: the largest rank-one terms of all, in their order."""
    left = torch.cat([unit.up for unit in units], dim=1)
    right = torch.cat([unit.down for unit in units]).T
    sizes = torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=0)
    chosen = sizes.argsort(descending=True, stable=True)[:count].sort().values
    return _unit(left[:, chosen]), _unit(right[:, chosen])


def _unit(columns: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(columns, dim=0)
    return columns / norms.clamp(min=torch.finfo(COMPUTE).tiny)


def _diagonal_cores(units: Sequence[Factors], left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The best diagonals, (n, R): (UᵀU ∘ VᵀV)·s = diag(Uᵀ·ΔW·V)."""
    inner = _inverse((left.T @ left) * (right.T @ right))
    sides = torch.stack([((left.T @ unit.up) * (unit.down @ right).T).sum(1) for unit in units])
    return sides @ inner


def _weighted(
    units: Sequence[Factors],
    other: torch.Tensor,
    cores: torch.Tensor,
    turned: Callable[[Factors], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Σ ΔW_t · other · diag(s_t), for ΔW_t or its transpose."""
    terms = (turned(unit) for unit in units)
    total = torch.zeros(0, dtype=COMPUTE)
    for number, ((outer, inner), core) in enumerate(zip(terms, cores, strict=True)):
        term = outer @ ((inner @ other) * core)
        total = total + term if number else term
    return total


def _solved(sides: torch.Tensor, other: torch.Tensor, cores: torch.Tensor) -> torch.Tensor:
    """The best columns, with norms of 1: what is divided out goes into the cores, which are solved for again."""
    return _unit(sides @ _inverse((other.T @ other) * (cores.T @ cores)))


def _inverse(gram: torch.Tensor) -> torch.Tensor:
    inverse: torch.Tensor = torch.linalg.pinv(gram, rtol=_SINGULAR, hermitian=True)
    return inverse


def _lost(
    units: Sequence[Factors],
    squares: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    cores: torch.Tensor,
) -> torch.Tensor:
    """Squares of the relative errors, (n,)."""
    grams = (left.T @ left) * (right.T @ right)
    crossed = torch.stack([((left.T @ unit.up) * (unit.down @ right).T).sum(1) for unit in units])
    own = ((cores @ grams) * cores).sum(1)
    lost: torch.Tensor = squares - 2.0 * (crossed * cores).sum(1) + own
    return lost.clamp(min=0.0)
