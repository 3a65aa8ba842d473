"""Singular values and norms of ΔW = up @ down from the factors alone, in numpy.

ΔW is never formed. With the Gram matrices G = upᵀup and H = down·downᵀ (rank, rank) and H = L·Lᵀ, the squared
singular values of ΔW are the eigenvalues of LᵀGL, and ‖ΔW‖_F² = tr(GH). Inspecting a file reads every tensor
once, so the cost to stay near is that of reading: Gram matrices of half-precision factors are computed in
float32 over short blocks that are summed in float64, those of wider factors in float64.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratools.errors import ShapeError
from loratools.maths._gram import Gram, grams, widened

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Pair = tuple[Array, Array]

# Gram matrices square the condition number. Where the rank-one terms cancel to less than this share of their
# squared norms, the factors are orthogonalised in float64 instead.
_CANCELLED = 1.0 / 16.0
_PAIRS_PER_TASK = 64
_MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class Norms:
    """How large a ΔW is and over how many directions it is spread.

    Attributes:
        frobenius: ‖ΔW‖_F = sqrt(Σσ²).
        spectral: ‖ΔW‖₂ = σ₁.
        stable_rank: ‖ΔW‖_F² / σ₁²; 0 for a zero ΔW.
        effective_rank: exp(H(p)) with p = σ²/Σσ², H in nats; 0 for a zero ΔW. Roy and Vetterli ("The
            effective rank", EUSIPCO 2007) define p = σ/Σσ; the energies are used here so that every figure of
            a report speaks of Σσ² and so that tiny σ do not inflate it.
        energy: Σ_{j≤k}σ² / Σσ² for k = 1, 2, 4, 8, … below the rank; 1 throughout for a zero ΔW.
    """

    frobenius: float
    spectral: float
    stable_rank: float
    effective_rank: float
    energy: dict[int, float]


def spectrum(up: Array, down: Array) -> Float64:
    """The singular values of up @ down, descending, from the factors alone.

    Relative error of σ₁ and of sqrt(Σσ²): at most 1e-5 for half-precision factors, 1e-12 for wider ones. Any
    σ has an absolute error of at most about 1e-3·σ₁ (half precision) or 1e-7·σ₁: smaller ones are noise.

    Args:
        up: (out, rank), float16, float32 or float64 of any strides; uint16 is read as the bits of bfloat16.
        down: (rank, in), likewise.

    Returns:
        (min(rank, out, in),) float64; NaN throughout where a factor holds NaN or Inf.

    Raises:
        ShapeError: The factors do not fit each other.
    """
    return _spectra([(up, down)])[0]


def spectra(pairs: Iterable[Pair], threads: int | None = None) -> list[Float64]:
    """``spectrum`` of every (up, down), in order, on several threads.

    The pairs are taken from the iterable a few blocks ahead of the work, so that lazily loaded ones need not
    be in memory together.

    Args:
        pairs: (up, down) as ``spectrum`` takes them.
        threads: A count; by default OMP_NUM_THREADS, else one per processor, at most 8.
    """
    stated = os.environ.get("OMP_NUM_THREADS", "")
    available = int(stated) if stated.isdigit() and int(stated) else os.cpu_count() or 1
    count = threads or min(available, _MAX_THREADS)
    found: list[Float64] = []
    waiting: deque[Future[list[Float64]]] = deque()
    with ThreadPoolExecutor(count) as pool:
        for block in _blocks(pairs):
            waiting.append(pool.submit(_spectra, block))
            if len(waiting) > 2 * count:
                found += waiting.popleft().result()
        for future in waiting:
            found += future.result()
    return found


def summarise(sigma: Float64, scale: float = 1.0) -> Norms:
    """The norms of ``scale`` · ΔW from the singular values of ΔW.

    Args:
        sigma: (k,) descending.
        scale: What multiplies the product; its sign is of no matter.
    """
    top = float(sigma[0]) if sigma.size else 0.0
    smaller = [1 << power for power in range(sigma.size.bit_length()) if 1 << power < sigma.size]
    if top == 0.0:
        return Norms(0.0, 0.0, 0.0, 0.0, dict.fromkeys(smaller, 1.0))
    # Relative to σ₁, so that squares neither overflow nor underflow.
    squares = np.square(sigma / top)
    total = float(squares.sum())
    share = squares / total
    entropy = -float(np.sum(share * np.log(np.where(share > 0.0, share, 1.0))))
    kept = np.cumsum(share)
    return Norms(
        frobenius=abs(scale) * top * float(np.sqrt(total)),
        spectral=abs(scale) * top,
        stable_rank=total,
        effective_rank=float(np.exp(entropy)),
        energy={rank: min(1.0, float(kept[rank - 1])) for rank in smaller},
    )


def _blocks(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    iterator = iter(pairs)
    while block := list(islice(iterator, _PAIRS_PER_TASK)):
        yield block


def _spectra(pairs: Sequence[Pair]) -> list[Float64]:
    """The spectra of a few pairs; the small eigenproblems of one rank are solved in one call."""
    for up, down in pairs:
        _check(up, down)
    lefts, rights = grams([up for up, _ in pairs]), grams([down.T for _, down in pairs])
    found: list[Float64 | None] = [None] * len(pairs)
    by_rank: dict[int, list[tuple[int, Gram, Gram]]] = {}
    for index, ((up, down), left, right) in enumerate(zip(pairs, lefts, rights, strict=True)):
        found[index] = _special_case(up, down, left, right)
        if found[index] is None:
            by_rank.setdefault(up.shape[1], []).append((index, left, right))
    for group in by_rank.values():
        sigma = _by_gram(
            np.stack([left.matrix for _, left, _ in group]), np.stack([right.matrix for _, _, right in group])
        )
        for row, (index, left, right) in zip(sigma, group, strict=True):
            found[index] = np.ldexp(row, left.exponent + right.exponent)
    return [sigma for sigma in found if sigma is not None]


def _check(up: Array, down: Array) -> None:
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ShapeError(
            f"up {list(up.shape)} and down {list(down.shape)} do not fit each other",
            expected="up (out, rank) and down (rank, in) with one rank were expected",
        )


def _special_case(up: Array, down: Array, left: Gram, right: Gram) -> Float64 | None:
    """The spectrum where Gram matrices cannot give it: zero, not finite, wide factors, or cancellation."""
    rank = up.shape[1]
    count = min(rank, up.shape[0], down.shape[1])
    if not (left.finite and right.finite):
        return np.full(count, np.nan)
    apart = float(left.matrix.diagonal() @ right.matrix.diagonal())
    if apart == 0.0:
        return np.zeros(count)
    together = float(np.vdot(left.matrix, right.matrix))
    if count < rank or together < _CANCELLED * apart:
        return _by_qr(up, down)
    return None


def _by_gram(left: Float64, right: Float64) -> Float64:
    """Singular values (batch, rank) from stacked Gram matrices (batch, rank, rank)."""
    try:
        root = np.linalg.cholesky(right)
    except np.linalg.LinAlgError:
        # Some down is rank-deficient: a symmetric root serves as well and always exists.
        values, vectors = np.linalg.eigh(right)
        root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    squares = np.linalg.eigvalsh(root.transpose(0, 2, 1) @ left @ root)
    descending: Float64 = np.sqrt(np.maximum(squares, 0.0))[:, ::-1]
    return descending


def _by_qr(up: Array, down: Array) -> Float64:
    """Singular values by orthogonalising both factors in float64, which squares nothing."""
    (left, left_exponent), (right, right_exponent) = widened(up), widened(down)
    core = _triangle(left) @ _triangle(right.T).T
    sigma: Float64 = np.linalg.svd(core, compute_uv=False)
    return np.ldexp(sigma, left_exponent + right_exponent)


def _triangle(factor: Float64) -> Float64:
    """R of factor = Q·R, or the factor itself where it is no taller than wide."""
    if factor.shape[0] <= factor.shape[1]:
        return factor
    return np.asarray(np.linalg.qr(factor, mode="r"))
