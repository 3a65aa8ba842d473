"""The singular value decomposition of the difference of two weights, as far as a rank rule asks for.

``exact`` takes the Gram matrix of the smaller side or a full decomposition (``_gram_svd``); ``randomized`` searches
by block Krylov iteration until its error is within a tolerance of the optimum, and goes over to ``exact`` where it
cannot say so (``_krylov``). ``auto`` searches where that is cheaper: where the smaller side is at least eight
times as wide as a block. Either way the error against the best possible at the rank comes with the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from loratools.errors import NonFiniteError, OptionError, ShapeError
from loratools.maths._approximation import Approximation
from loratools.maths._gram_svd import decompose_exactly
from loratools.maths._krylov import Size, Target, search, width_for
from loratools.maths.lowrank import COMPUTE, Svd, signed
from loratools.maths.rank import Float64, Rule, check_rule
from loratools.maths.squares import square_of

METHODS = ("auto", "exact", "randomized")

_WORTHWHILE = 8
_FEASIBLE = 2
_PRODUCTS = 10
_FIRST_GUESS = 32
# Squares of float32 numbers between these sum up without loss.
_SAFE_LOW, _SAFE_HIGH = 1e-10, 1e10


class Decomposed(NamedTuple):
    """The approximation u · diag(sigma) · vh of a matrix D, and how good it is.

    Attributes:
        u: (out, k) float64, orthonormal columns; the largest entry of each by magnitude is positive.
        sigma: (k,) float64, descending. k is 0 for a zero matrix and never exceeds the numerical rank.
        vh: (k, in) float64, orthonormal rows.
        energy: ‖D‖_F².
        captured: ‖D‖_F² − ‖D − u·σ·vh‖_F²: Σσ² of the k kept, to the rounding of float32 products.
        bound: A bound of the largest ``captured`` that any approximation of rank k has.
        method: "exact" or "randomized": the one that gave the result.
        values: All σ that are known, descending; of a randomized search those beyond k are only lower bounds.
        lost: ‖D − u·σ·vh‖_F²; more digits than energy − captured where little is lost.
        gap: bound − captured, likewise.
    """

    u: torch.Tensor
    sigma: torch.Tensor
    vh: torch.Tensor
    energy: float
    captured: float
    bound: float
    method: str
    values: Float64
    lost: float
    gap: float

    @property
    def error(self) -> float:
        """‖D − u·σ·vh‖ / ‖D‖; 0 for a zero matrix."""
        return math.sqrt(self.lost / self.energy) if self.energy else 0.0

    @property
    def optimum(self) -> float:
        """A lower bound of what ``error`` is at best at this rank."""
        return math.sqrt(max(0.0, self.lost - self.gap) / self.energy) if self.energy else 0.0


class _Prepared(NamedTuple):
    """A matrix as it is worked on: no wider than tall, its squares within float32's range."""

    matrix: torch.Tensor
    exponent: int
    turned: bool
    size: Size


def decompose(
    matrix: torch.Tensor,
    rule: Rule,
    *,
    method: str = "auto",
    tolerance: float = 1e-3,
    seed: int = 0,
    noise: float = 0.0,
    energy: float | None = None,
) -> Decomposed:
    """The best approximation of the rank that a rule asks for, or one within a tolerance of it.

    The same seed gives the same result, on any number of threads that the matrix library sums alike on; the caller
    runs matrices side by side on one thread each.

    Args:
        matrix: (out, in), float32 or cast to it, on any device (one without float64 sends it to the CPU).
        rule: Of the rank. The randomized way sees singular values a little too small, by what the tolerance allows:
            "energy" and "error" are met for certain, if need be with a rank more than the fewest; "ratio" may
            differ where a singular value lies that near to the limit.
        method: "auto", "exact" or "randomized".
        tolerance: The excess of ‖D − D_k‖_F over the optimum that is allowed, a fraction, above 0.
        seed: Of the random start.
        noise: A Frobenius norm, of the rounding in D for one. The rank is cut to the smallest that leaves no more
            than this.
        energy: ‖D‖_F², where the caller knows it to float64's rounding.

    Raises:
        NonFiniteError: The matrix holds NaN or Inf.
        OptionError: A rule, method or tolerance that has no meaning.
        ShapeError: It is no matrix.
    """
    energies = () if energy is None else (energy,)
    (found,) = decompose_batch(
        matrix[None], rule, method=method, tolerance=tolerance, seed=seed, noise=(noise,), energies=energies
    )
    return found


def decompose_batch(
    matrices: torch.Tensor,
    rule: Rule,
    *,
    method: str = "auto",
    tolerance: float = 1e-3,
    seed: int = 0,
    noise: Sequence[float] = (),
    energies: Sequence[float] = (),
) -> list[Decomposed]:
    """``decompose`` of matrices of one shape; those that are searched are multiplied together.

    What is drawn, and when a search ends, depends on each matrix alone: the results are those of single calls, to
    rounding.

    Args:
        matrices: (n, out, in).
        rule: As in ``decompose``; likewise method, tolerance and seed.
        method: See there.
        tolerance: See there.
        seed: See there.
        noise: One per matrix, or none.
        energies: Likewise.

    Raises:
        NonFiniteError: A matrix holds NaN or Inf.
        OptionError: A rule, method or tolerance that has no meaning, or noise for another number of matrices.
        ShapeError: It is no stack of matrices.
    """
    levels = tuple(noise) or (0.0,) * len(matrices)
    _check(matrices, rule, method, tolerance, levels)
    if matrices.device.type == "mps":
        matrices = matrices.cpu()
    known = tuple(energies) or (None,) * len(matrices)
    prepared = [_prepare(*each) for each in zip(matrices, levels, known, strict=True)]
    found = {index: _zero(one) for index, one in enumerate(prepared) if one.size.energy == 0.0}
    for width in _widths(int(prepared[0].matrix.shape[1]), rule, method) if prepared else ():
        left = [index for index in range(len(prepared)) if index not in found]
        if not left:
            break
        stack = torch.stack([prepared[index].matrix for index in left]) if len(left) > 1 else None
        whole = prepared[left[0]].matrix[None] if stack is None else stack
        sizes = [prepared[index].size for index in left]
        ends = search(whole, sizes, Target(rule, tolerance, seed), width, _PRODUCTS)
        for index, end in zip(left, ends, strict=True):
            if end is not None:
                found[index] = _result(prepared[index], end, "randomized")
    for index, one in enumerate(prepared):
        if index not in found:
            exact = decompose_exactly(one.matrix, one.size.energy, rule, one.size.noise)
            found[index] = _result(one, exact, "exact")
    return [found[index] for index in range(len(prepared))]


def _check(
    matrices: torch.Tensor, rule: Rule, method: str, tolerance: float, levels: Sequence[float]
) -> None:
    check_rule(rule)
    if method not in METHODS:
        raise OptionError(
            f"no decomposition is called {method!r}", expected=f"One of {', '.join(METHODS)} was expected"
        )
    if not 0.0 < tolerance < math.inf:
        raise OptionError(f"tolerance {tolerance:g}", expected="A fraction above 0 was expected")
    if matrices.ndim != 3 or 0 in matrices.shape[1:]:
        raise ShapeError(
            f"a tensor of shape {list(matrices.shape[1:])} has no singular values",
            expected="A matrix (out, in) was expected",
        )
    if len(levels) != len(matrices) or not all(level >= 0.0 for level in levels):
        raise OptionError(
            f"noise {list(levels)} of {len(matrices)} matrices",
            expected="One norm of at least 0 per matrix was expected",
        )


def _prepare(matrix: torch.Tensor, noise: float, known: float | None) -> _Prepared:
    """The matrix stood upright, and scaled by a power of two where its squares would leave float32.

    Raises:
        NonFiniteError: It holds NaN or Inf.
    """
    matrix = matrix.detach().to(torch.float32)
    energy = square_of(matrix) if known is None else known
    if not math.isfinite(energy):
        raise NonFiniteError(
            f"a matrix of shape {list(matrix.shape)} holds NaN or Inf",
            expected="Finite values were expected",
        )
    exponent = 0
    # The largest number lies between the root of their mean square and the norm.
    if energy and not (_SAFE_LOW**2 * matrix.numel() < energy < _SAFE_HIGH**2):
        exponent = math.frexp(float(matrix.abs().max()))[1]
        matrix = (matrix.to(COMPUTE) * 2.0**-exponent).to(torch.float32)
        energy = square_of(matrix)
    turned = matrix.shape[0] < matrix.shape[1]
    size = Size(energy, math.ldexp(noise, -exponent))
    return _Prepared(matrix.mT if turned else matrix, exponent, turned, size)


def widest_search(side: int, rule: Rule, method: str) -> int:
    """How wide blocks a search may take for a matrix, a count; 0 where it is decomposed exactly at once.

    Args:
        side: The smaller of its sides.
        rule: As in ``decompose``; likewise the method.
        method: See there.
    """
    return max(_widths(side, rule, method), default=0)


def _widths(side: int, rule: Rule, method: str) -> Iterator[int]:
    """The widths of blocks to search with, one after the other while they do not suffice; none for the exact way."""
    if method == "exact":
        return
    limit = side if rule.most is None else min(side, rule.most)
    guess = int(rule.value) if rule.kind == "rank" else _FIRST_GUESS
    guess = min(max(guess, rule.least), limit)
    while True:
        width = width_for(guess)
        if width * (_WORTHWHILE if method == "auto" else _FEASIBLE) > side:
            return
        yield width
        if rule.kind == "rank" or guess >= limit:
            return
        guess = min(2 * guess, limit)


def _result(one: _Prepared, found: Approximation, method: str) -> Decomposed:
    """An approximation in the matrix's own scale and place."""
    u, vh = (found.vh.mT, found.u.mT) if one.turned else (found.u, found.vh)
    vectors = signed(Svd(u, found.sigma, vh))
    scale = 2.0**one.exponent
    energy, lost, gap = (value * scale**2 for value in (one.size.energy, max(0.0, found.lost), found.gap))
    captured = energy - lost
    sigma = vectors.sigma * scale
    bound = min(energy, captured + gap)
    return Decomposed(
        vectors.u, sigma, vectors.vh, energy, captured, bound, method, found.values * scale, lost, gap
    )


def _zero(one: _Prepared) -> Decomposed:
    out, width = one.matrix.mT.shape if one.turned else one.matrix.shape
    empty = one.matrix.new_zeros(0, dtype=COMPUTE)
    u, vh = empty.new_zeros(out, 0), empty.new_zeros(0, width)
    return Decomposed(u, empty, vh, 0.0, 0.0, 0.0, "exact", np.zeros(min(out, width)), 0.0, 0.0)
