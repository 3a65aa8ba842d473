"""Low-rank matrices as pairs of factors: sums, singular values, and the best approximation of a given rank.

ΔW = up @ down is never formed unless it is smaller than its factors. Both factors are orthogonalised,
up = Q·R and downᵀ = P·S, and the singular value decomposition of the small core R·Sᵀ = U·Σ·Vᵀ gives that of
ΔW = (Q·U)·Σ·(P·V)ᵀ. Q and P stay implicit as Householder reflectors and are applied only to the columns kept.
All arithmetic is float64 on the device where the factors lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from loratools.errors import NonFiniteError, OptionError, ShapeError
from loratools.maths._cholesky import CholeskySide, is_orthonormal, orthogonalise

COMPUTE = torch.float64

# Rounding in the core is a few units in the last place of the rank-one terms that were added up; what is left
# of terms that cancel lies below this many of them.
CANCELLATION = 16.0


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A matrix up @ down with every scale folded in.

    Attributes:
        up: (out, rank).
        down: (rank, in), of the same dtype on the same device.
    """

    up: torch.Tensor
    down: torch.Tensor

    def __post_init__(self) -> None:
        up, down = self.up, self.down
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or up.dtype != down.dtype:
            found = f"up {list(up.shape)} {up.dtype} and down {list(down.shape)} {down.dtype}"
            raise ShapeError(
                f"{found} do not fit each other",
                expected="Matrices (out, rank) and (rank, in) of one rank and one dtype were expected",
            )

    @property
    def rank(self) -> int:
        """The number of rank-one terms, a count; the matrix may have a lower rank."""
        return int(self.up.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return int(self.up.shape[0]), int(self.down.shape[1])

    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors in another dtype, without a copy where they are in it already."""
        return Factors(self.up.to(dtype), self.down.to(dtype))

    def delta(self) -> torch.Tensor:
        """The matrix itself, (out, in) float64."""
        return self.up.to(COMPUTE) @ self.down.to(COMPUTE)


@dataclass(frozen=True, slots=True, eq=False)
class Svd:
    """u · diag(sigma) · vh with orthonormal columns and rows and sigma descending; k = min(rank, out, in).

    Attributes:
        u: (out, k) float64.
        sigma: (k,) float64.
        vh: (k, in) float64.
    """

    u: torch.Tensor
    sigma: torch.Tensor
    vh: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """A matrix approximated by factors of a lower rank.

    Attributes:
        factors: The approximation in float64, with sqrt(σ) on both sides.
        energy: The fraction of the input's Σσ² retained, in [0, 1]; 1 for a zero matrix.
        sigma: The singular values of the input, as far as they are known, descending; float64.
    """

    factors: Factors
    energy: float
    sigma: torch.Tensor

    @property
    def square(self) -> float:
        """‖·‖_F² of the approximation."""
        # Where all of sigma is rounding, the one term of the factors is zero and stands for none of it.
        if not self.factors.up.any():
            return 0.0
        return float(self.sigma[: self.factors.rank].square().sum())


class _Expands(Protocol):
    """One factor's orthonormal basis."""

    def expand(self, vectors: torch.Tensor, length: int) -> torch.Tensor:
        """The basis times ``vectors``, as (length, k)."""


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """One factor x (n, rank) as orthonormal columns times a small matrix.

    Attributes:
        core: (min(n, rank), rank); x itself where x is no taller than wide.
        reflectors: Householder vectors and their coefficients, or None where x is its own core.
    """

    core: torch.Tensor
    reflectors: tuple[torch.Tensor, torch.Tensor] | None

    def expand(self, vectors: torch.Tensor, length: int) -> torch.Tensor:
        """The orthonormal columns times ``vectors`` (min(n, rank), k), as (n, k)."""
        if self.reflectors is None:
            return vectors
        padded = vectors.new_zeros(length, vectors.shape[1])
        padded[: vectors.shape[0]] = vectors
        return torch.ormqr(*self.reflectors, padded)


def stack(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ weightᵢ · upᵢ @ downᵢ exactly, as one pair of factors of the summed rank.

    Each weight goes as sqrt(|weight|) into both factors, so that neither side outgrows the other, and its
    sign into up.

    Args:
        parts: At least one, all of one shape (out, in).
        weights: One per part.

    Returns:
        Factors in float64.

    Raises:
        ShapeError: The parts differ in shape.
    """
    shapes = {part.shape for part in parts}
    if len(shapes) != 1:
        raise ShapeError(
            f"matrices of shapes {sorted(shapes)} cannot be added",
            expected="Parts of one shape (out, in) were expected",
        )
    out, width = parts[0].shape
    rank = sum(part.rank for part in parts)
    up = torch.empty(out, rank, dtype=COMPUTE, device=parts[0].up.device)
    down = torch.empty(rank, width, dtype=COMPUTE, device=parts[0].up.device)
    start = 0
    for part, weight in zip(parts, weights, strict=True):
        root, stop = abs(weight) ** 0.5, start + part.rank
        # Widened on the way into place: these matrices are large, and each pass over them counts.
        up[:, start:stop].copy_(part.up).mul_(-root if weight < 0 else root)
        down[start:stop].copy_(part.down).mul_(root)
        start = stop
    return Factors(up, down)


def svd(factors: Factors) -> Svd:
    """The singular value decomposition of up @ down from its factors.

    The largest entry by magnitude of every column of u is positive, so that one input gives one file.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
    """
    left, core, right = _decompose(factors)
    return _assemble(factors.shape, left, core, right)


def numerical_rank(
    sigma: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, floor: float = 0.0
) -> int:
    """How many singular values exceed rounding: σ > max(σ₁ · max(out, in) · eps, floor).

    Args:
        sigma: (k,) descending.
        shape: (out, in).
        dtype: The dtype that sigma was computed in, which sets eps.
        floor: An absolute error of sigma that is known otherwise.
    """
    if not sigma.numel():
        return 0
    tolerance = max(float(sigma[0]) * max(shape) * torch.finfo(dtype).eps, floor)
    return int((sigma > tolerance).sum())


def compress(factors: Factors, rank: int | None = None) -> Compressed:
    """The best approximation of up @ down of a given rank, or the matrix itself at its numerical rank.

    By Eckart, Young and Mirsky the truncated singular value decomposition is the nearest matrix of its rank
    in every unitarily invariant norm.

    Args:
        factors: Of any rank.
        rank: A count of at least 1, or None to drop only what is rounding noise. Where the numerical rank is
            lower than asked for, that is kept and nothing is padded.

    Returns:
        Factors of rank at least 1: a zero matrix keeps one zero term.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
        OptionError: The rank is below 1.
    """
    check_rank(rank)
    fast = _decompose_fast(factors)
    if fast is not None:
        # Independent columns on both sides leave no cancellation to allow for.
        compressed, found = _truncate(factors, rank, *fast, noise=0.0)
        whole = compressed.factors.rank == min(rank or factors.rank, factors.rank)
        # Singular values that vanish, or vectors that are not orthonormal, are beyond what Gram matrices resolve.
        if whole and is_orthonormal(found.u) and is_orthonormal(found.vh.T):
            return compressed
    return _truncate(factors, rank, *_decompose(factors), noise=cancellation(factors))[0]


def _truncate(
    factors: Factors, rank: int | None, left: _Expands, core: Svd, right: _Expands, *, noise: float
) -> tuple[Compressed, Svd]:
    """The approximation of a given rank from a decomposition, and its singular vectors."""
    real = numerical_rank(core.sigma, factors.shape, COMPUTE, noise)
    kept = real if rank is None else min(rank, real)
    energy = 1.0 if kept == real else retained(core.sigma, kept)
    part = Svd(core.u[:, :kept], core.sigma[:kept], core.vh[:kept])
    found = _assemble(factors.shape, left, part, right)
    return Compressed(balanced(found), energy, core.sigma), found


def _decompose_fast(factors: Factors) -> tuple[CholeskySide, Svd, CholeskySide] | None:
    """The decomposition by Gram matrices, or None where they are not accurate enough."""
    left = orthogonalise(factors.up.to(COMPUTE))
    right = orthogonalise(factors.down.to(COMPUTE).T) if left is not None else None
    if left is None or right is None:
        return None
    return left, dense_svd(left.core @ right.core.T), right


def balanced(found: Svd) -> Factors:
    """u·sqrt(σ) and sqrt(σ)·vh; where no singular values are left, zero factors of rank 1."""
    if not found.sigma.numel():
        return Factors(
            found.u.new_zeros(found.u.shape[0], 1),
            found.vh.new_zeros(1, found.vh.shape[1]),
        )
    root = found.sigma.sqrt()
    return Factors(found.u * root, root[:, None] * found.vh)


def retained(sigma: torch.Tensor, rank: int) -> float:
    """The fraction of Σσ² in the first ``rank`` singular values; 1 where all are zero."""
    top = float(sigma[0]) if sigma.numel() else 0.0
    if top == 0.0:
        return 1.0
    squares = (sigma / top).square()
    return min(1.0, float(squares[:rank].sum() / squares.sum()))


def check_rank(rank: int | None) -> None:
    """Refuse a rank below 1.

    Raises:
        OptionError: It is.
    """
    if rank is not None and rank < 1:
        raise OptionError(f"rank {rank}", expected="A rank is a whole number of at least 1")


def dense_svd(matrix: torch.Tensor) -> Svd:
    """The thin decomposition of a small matrix, by divide and conquer or, where that fails, by QR iteration.

    Raises:
        NonFiniteError: The matrix holds NaN or Inf.
    """
    if not bool(matrix.isfinite().all()):
        raise NonFiniteError(
            f"a matrix of shape {list(matrix.shape)} holds NaN or Inf",
            expected="Finite factors were expected",
        )
    try:
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    except RuntimeError:
        # LAPACK's gesdd gives up on rare matrices that gesvd still decomposes; torch's LinAlgError is a
        # RuntimeError. What neither can do, scipy raises. It is imported for this alone, since that takes a while.
        import scipy.linalg

        arrays = scipy.linalg.svd(matrix.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
        u, sigma, vh = (torch.from_numpy(array).to(matrix) for array in arrays)
    return Svd(u, sigma, vh)


def signed(found: Svd) -> Svd:
    """The same decomposition with the largest entry by magnitude of every column of u positive."""
    if not found.u.numel():
        return found
    largest = found.u.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(found.u.gather(0, largest)[0] < 0, -1.0, 1.0).to(found.u)
    return Svd(found.u * sign, found.sigma, found.vh * sign[:, None])


def _decompose(factors: Factors) -> tuple[_Side, Svd, _Side]:
    left = _orthogonalise(factors.up.to(COMPUTE))
    right = _orthogonalise(factors.down.to(COMPUTE).T)
    return left, dense_svd(left.core @ right.core.T), right


def _orthogonalise(factor: torch.Tensor) -> _Side:
    length, rank = factor.shape
    if length <= rank:
        return _Side(factor, None)
    packed, coefficients = torch.geqrf(factor)
    return _Side(packed[:rank].triu(), (packed, coefficients))


def _assemble(shape: tuple[int, int], left: _Expands, core: Svd, right: _Expands) -> Svd:
    u = left.expand(core.u, shape[0])
    vh = right.expand(core.vh.T, shape[1]).T
    return signed(Svd(u, core.sigma, vh))


def cancellation(factors: Factors) -> float:
    """A bound on the rounding error of the singular values that cancellation between terms leaves behind."""
    lengths = torch.linalg.vector_norm(factors.up.to(COMPUTE), dim=0)
    widths = torch.linalg.vector_norm(factors.down.to(COMPUTE), dim=1)
    return float(lengths @ widths) * torch.finfo(COMPUTE).eps * CANCELLATION
