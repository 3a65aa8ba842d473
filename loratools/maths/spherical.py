"""Means on the sphere of directions, as coefficients of the matrices: rules for ``means.mean``.

A matrix is a length times a direction, a point of the unit sphere in the space of all matrices of its shape. Between
two points there is a shortest way, the great circle, unless they are opposite. The logarithm of u at m is the vector
that leads along it from m to u, θ/sin θ · (u − cos θ·m) for the angle θ; the exponential of a vector v at m is where it
leads, cos‖v‖·m + sin‖v‖·v/‖v‖. All of it stays in the span of the directions.

Shoemake: "Animating rotation with quaternion curves", SIGGRAPH 1985; Karcher: "Riemannian center of mass and mollifier
smoothing", 1977; Buss, Fillmore: "Spherical averages and applications to spherical splines and interpolation", 2001.
"""

from __future__ import annotations

import math

import numpy as np

from loratools.errors import OptionError
from loratools.maths.means import ALIKE, Float64, coordinates, cosines_of, inverses

_CONVERGED = 1e-12
# Directions within 90° of their mean take some ten to thirty steps.
_KARCHER_STEPS = 200


def slerp(gram: Float64, shares: Float64) -> Float64:
    """sin((1 − t)·θ)/sin θ and sin(t·θ)/sin θ, where t is the second share and θ the angle between the two.

    Two matrices of one length give one of that length. Where there is no single great circle (they are parallel or
    opposite within 2⁻¹⁶, or one is zero) the shares themselves are taken, a linear interpolation.

    Raises:
        OptionError: There are other than two matrices.
    """
    cosine = _cosine(gram, shares)
    return shares if cosine is None else _along(cosine, shares)


def nuslerp(gram: Float64, shares: Float64) -> Float64:
    """The point between two directions on their great circle, at the weighted mean of the two lengths.

    Where there is no single great circle the shares themselves are taken, as in :func:`slerp`.

    Raises:
        OptionError: There are other than two matrices.
    """
    cosine = _cosine(gram, shares)
    if cosine is None:
        return shares
    lengths = np.sqrt(gram.diagonal())
    found: Float64 = (shares @ lengths) * _along(cosine, shares) / lengths
    return found


def multislerp(gram: Float64, shares: Float64) -> Float64:
    """The mean in the tangent space of the sphere at the weighted mean of the directions.

    The directions' logarithms at m = Σ pᵢuᵢ / ‖·‖ are averaged; the average's exponential is the result's direction and
    its length the weighted mean of the lengths. Directions that balance out (‖Σ pᵢuᵢ‖ < 2⁻¹⁶) have no mean; the
    shares themselves are taken then.
    """
    return _on_sphere(gram, shares, 1)


def karcher(gram: Float64, shares: Float64) -> Float64:
    """The point on the sphere with the least weighted sum of squared angles to all directions.

    The steps of :func:`multislerp` are repeated, each from the point that the last one found, until they move by less
    than 10⁻¹² (radians), at most 200 times. Its length is the weighted mean of the lengths. Directions that balance out
    have no mean; the shares themselves are taken then.
    """
    return _on_sphere(gram, shares, _KARCHER_STEPS)


def _cosine(gram: Float64, shares: Float64) -> float | None:
    """The cosine of the angle between two matrices, or None where no great circle is defined by it."""
    if shares.size != 2:
        raise OptionError(
            f"{shares.size} matrices to interpolate between",
            expected="Exactly two were expected",
            todo="Use karcher or multislerp for more",
        )
    cosine = float(cosines_of(gram)[0, 1])
    return cosine if gram.diagonal().all() and 1.0 - cosine**2 >= ALIKE**2 else None


def _along(cosine: float, shares: Float64) -> Float64:
    """Coefficients of two unit vectors for the point that divides the great circle between them by the shares."""
    angle = math.acos(cosine)
    found: Float64 = np.sin(shares * angle) / math.sin(angle)
    return found


def _on_sphere(gram: Float64, shares: Float64, steps: int) -> Float64:
    """The mean direction after some steps from the normalised sum, at the mean length, as coefficients."""
    lengths = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    units = coordinates(cosines_of(gram))
    present = shares * (lengths > 0.0)
    length = float(np.linalg.norm(units @ present))
    if length < ALIKE:
        return shares
    at = present / length
    for _ in range(steps):
        at, angle = _step(units, present / present.sum(), at)
        if angle < _CONVERGED:
            break
    found: Float64 = (shares @ lengths) * at * inverses(lengths)
    return found


def _step(units: Float64, shares: Float64, at: Float64) -> tuple[Float64, float]:
    """The exponential of the mean logarithm at a point, both as coefficients of the unit vectors, and the angle."""
    point = units @ at
    cosines = np.clip(point @ units, -1.0, 1.0)
    apart = units - np.outer(point, cosines)
    sines = np.linalg.norm(apart, axis=0)
    # θ/sin θ is 1 at the point itself. From opposite it no way is the shortest: such a direction does not pull.
    pull = np.where(cosines > 0.0, 1.0, 0.0)
    clear = sines >= ALIKE
    pull[clear] = np.arctan2(sines[clear], cosines[clear]) / sines[clear]
    pull *= shares
    tangent = pull - float(pull @ cosines) * at
    angle = float(np.linalg.norm(units @ tangent))
    if angle == 0.0:
        return at, angle
    after = math.cos(angle) * at + math.sin(angle) / angle * tangent
    # Rounding would let the length drift over many steps.
    return after / float(np.linalg.norm(units @ after)), angle
