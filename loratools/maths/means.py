"""Means of several matrices that are weighted sums of them, found from their inner products alone.

Each of these means of ΔW₁ … ΔW_T lies in their span. Everything about it, lengths, angles and distances, follows from
the Gram matrix Gᵢⱼ = ⟨ΔWᵢ, ΔWⱼ⟩ of T x T numbers. A rule takes G and gives one coefficient for each matrix; the sum
itself is a stack of factors. Rules on a sphere are in ``spherical``, those along a sequence in ``averages``.

Iterations run on coordinates, T columns of T numbers with the inner products G. G holds squares, so that it resolves
angles and relative distances down to √eps of float64; what is closer than 2⁻¹⁶ is treated as one, which moves a result
by about the square of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loratools.errors import NonFiniteError
from loratools.maths.inner import inner_products
from loratools.maths.lowrank import COMPUTE, Factors, compress, stack

Float64 = NDArray[np.float64]

Rule = Callable[[Float64, Float64], Float64]
"""From the Gram matrix (T, T) and shares (T,), positive and of sum 1, one coefficient for each matrix (T,)."""

# Angles, and distances as fractions of the longest matrix, below which two matrices are not told apart.
ALIKE = 2.0**-16

_CONVERGED = 1e-12
_MEDIAN_STEPS = 1000
# What pulls are off by. A median that is one of the matrices is found by comparing them.
_CLEARLY = 1.0 - 1e-9


class Sum(NamedTuple):
    """A weighted sum of matrices.

    Attributes:
        factors: The sum, or its nearest matrix of the rank that was asked for.
        energy: The fraction of Σσ² of the whole sum that is retained.
        square: ‖·‖_F² of ``factors``; None where nothing was computed.
    """

    factors: Factors
    energy: float
    square: float | None


def weighted_sum(parts: Sequence[Factors], coefficients: Sequence[float], rank: int | None = None) -> Sum:
    """Σ coefficientᵢ · upᵢ @ downᵢ at its numerical rank, or the nearest matrix of a lower one.

    Args:
        parts: At least one, all of one shape (out, in).
        coefficients: One per part.
        rank: A count of at least 1, or None for the whole sum.

    Returns:
        Float64 factors; one part of coefficient 1 without a rank comes back as it is.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
        OptionError: The rank is below 1.
    """
    if len(parts) == 1 and coefficients[0] == 1.0 and rank is None:
        return Sum(parts[0], 1.0, None)
    found = compress(stack(parts, coefficients), rank)
    return Sum(found.factors, found.energy, found.square)


def mean(
    rule: Rule,
    parts: Sequence[Factors],
    scales: Sequence[float],
    weights: Sequence[float],
    *,
    factor: float = 1.0,
    rank: int | None = None,
) -> Sum:
    """The mean that a rule defines, where weights are relative.

    The magnitude of a weight is its matrix's share, of the sum of all magnitudes; a negative weight turns its matrix
    round.

    Args:
        rule: What makes coefficients of the Gram matrix and the shares.
        parts: At least one, all of one shape (out, in).
        scales: What each product is multiplied by beforehand.
        weights: One per part, none of them 0.
        factor: What the mean is multiplied by.
        rank: A count of at least 1, or None for the whole mean.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
        OptionError: The rank is below 1.
    """
    turned = [math.copysign(1.0, weight) * scale for scale, weight in zip(scales, weights, strict=True)]
    coefficients = np.ones(1) if len(parts) == 1 else rule(gram_of(parts, turned), shares(weights))
    return weighted_sum(
        parts, [factor * float(one) * by for one, by in zip(coefficients, turned, strict=True)], rank
    )


def shares(weights: Sequence[float]) -> Float64:
    """|wᵢ| / Σ|wⱼ|, (T,).

    Args:
        weights: At least one that is not 0.
    """
    sizes = np.abs(np.asarray(weights, dtype=np.float64))
    # Divided by the largest first, so that a sum of huge weights is finite.
    sizes = sizes / sizes.max()
    found: Float64 = sizes / sizes.sum()
    return found


def gram_of(parts: Sequence[Factors], multipliers: Sequence[float]) -> Float64:
    """⟨ΔWᵢ, ΔWⱼ⟩ up to one common factor, which keeps squares of huge and tiny matrices in range: (T, T).

    Args:
        parts: At least one, all of one shape (out, in).
        multipliers: What each product is multiplied by.

    Raises:
        NonFiniteError: A factor or a multiplier holds NaN or Inf.
    """
    sizes = [
        abs(by) * float(part.up.to(COMPUTE).norm()) * float(part.down.to(COMPUTE).norm())
        for part, by in zip(parts, multipliers, strict=True)
    ]
    if not all(map(math.isfinite, sizes)):
        raise NonFiniteError("a factor holds NaN or Inf", expected="Finite factors were expected")
    largest = max(sizes)
    found: Float64 = inner_products(parts, [by / largest if largest else 0.0 for by in multipliers]).numpy()
    return found


def geometric_median(gram: Float64, shares: Float64) -> Float64:
    """The matrix with the least weighted sum of distances to all.

    By Weiszfeld's iteration from the weighted mean, with what Vardi and Zhang add where it meets one of the matrices,
    until it moves by less than 10⁻¹² of the longest matrix, at most 1000 steps. A matrix that is the median itself is
    found at once. Where the median is not unique (an even number in one line) the result is the one that the
    iteration reaches, which does not depend on the order.
    """
    points = coordinates(gram)
    scale = math.sqrt(float(gram.diagonal().max()))
    found = _median_among(points, shares, ALIKE * scale)
    if found is not None:
        return found
    weights = shares
    for _ in range(_MEDIAN_STEPS):
        after = _weiszfeld(points, shares, weights, ALIKE * scale)
        moved = float(np.linalg.norm(points @ (after - weights)))
        weights = after
        if moved <= _CONVERGED * scale:
            break
    return weights


def model_stock(gram: Float64) -> Float64:
    """t / T for each, t = T·c / (1 + (T − 1)·c), c the mean cosine over all pairs, as coefficients (T,).

    A negative mean cosine counts as 0: t would turn the mean round. A zero matrix has the cosine 0 with every other.
    """
    count = gram.shape[0]
    if count == 1:
        return np.ones(1)
    cosines = cosines_of(gram)
    cosine = max(0.0, float(cosines[np.triu_indices(count, 1)].mean()))
    return np.full(count, cosine / (1.0 + (count - 1) * cosine))


def orthogonal_addition(gram: Float64) -> Float64:
    """The sum of what is left of each matrix without its components along those before it, as coefficients (T,).

    A matrix that lies in the span of those before it (within 2⁻¹⁶ of its length) adds nothing.
    """
    points = coordinates(gram)
    total = np.zeros(gram.shape[0])
    kept: list[tuple[Float64, Float64]] = []
    for place, length in enumerate(np.linalg.norm(points, axis=0)):
        coefficients = np.zeros(gram.shape[0])
        coefficients[place] = 1.0
        rest = points[:, place].copy()
        for _ in range(2):
            # Twice: a short rest is orthogonal to rounding only after the second pass.
            for direction, of in kept:
                along = float(direction @ rest)
                rest, coefficients = rest - along * direction, coefficients - along * of
        left = float(np.linalg.norm(rest))
        if left > ALIKE * length:
            total += coefficients
            kept.append((rest / left, coefficients / left))
    return total


def cosines_of(gram: Float64) -> Float64:
    """Cosines of the angles between matrices, in [-1, 1]; 0 with a zero matrix: (T, T)."""
    inverse = inverses(np.sqrt(np.maximum(gram.diagonal(), 0.0)))
    found: Float64 = np.clip(gram * np.outer(inverse, inverse), -1.0, 1.0)
    return found


def inverses(values: Float64) -> Float64:
    """1 / value, and 0 where a value is 0."""
    found: Float64 = np.divide(1.0, values, out=np.zeros_like(values), where=values != 0.0)
    return found


def coordinates(gram: Float64) -> Float64:
    """Columns (T, T) whose inner products are a Gram matrix."""
    values, vectors = np.linalg.eigh(gram)
    found: Float64 = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    return found


def _median_among(points: Float64, shares: Float64, alike: float) -> Float64 | None:
    """The median where it clearly is one of the points, the others pulling less than it holds; as coefficients."""
    for place in range(shares.size):
        apart = points - points[:, place : place + 1]
        distances = np.linalg.norm(apart, axis=0)
        near = distances <= alike
        pull = np.linalg.norm(apart[:, ~near] @ (shares[~near] / distances[~near]))
        if float(pull) < _CLEARLY * float(shares[near].sum()):
            found: Float64 = np.where(near, shares, 0.0) / shares[near].sum()
            return found
    return None


def _weiszfeld(points: Float64, shares: Float64, weights: Float64, alike: float) -> Float64:
    """One step towards the median, as coefficients of the points."""
    here = points @ weights
    distances = np.linalg.norm(points - here[:, None], axis=0)
    near = distances <= alike
    if near.all():
        return weights
    pulls = np.divide(shares, distances, out=np.zeros_like(shares), where=~near)
    target: Float64 = pulls / pulls.sum()
    if not near.any():
        return target
    # At a point that is not the median the pull of the others decides how far to leave it.
    pull = float(np.linalg.norm(points @ pulls - pulls.sum() * here))
    stay = min(1.0, float(shares[near].sum()) / pull) if pull else 1.0
    return (1.0 - stay) * target + stay * weights
