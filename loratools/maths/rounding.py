"""Rounding to a store dtype: to the nearest value, at random without bias, or with a small correction that saves ΔW.

A change that is smaller than half the distance between neighbouring values of the store dtype is lost entry by entry
when each is rounded to the nearest. Stochastic rounding (Croci and others: "Stochastic rounding: implementation, error
analysis and applications", Royal Society Open Science 9, 2022) keeps it on the average, at twice the noise.
Compensated rounding keeps the noise of rounding to nearest and takes out of it what lies in a given subspace.

Floats of one sign are ordered as the integers of their bit patterns, so that neighbours are one apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from loratools.errors import NonFiniteError

_PATTERNS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
ROUNDS = 20
# Each correction is this share of the one before in proportion to what is left. A change of the correction moves
# entries across the middle between two values, which adds noise that grows with the root of the change: whole steps
# stop at the level of that noise, smaller ones go on beneath it.
_DAMPING = 0.82
# What is left is of no consequence once it is this small beside what rounding to nearest left.
_ENOUGH = 1e-3


class Compensated(NamedTuple):
    """A rounded matrix, and how much of its rounding error lies in the subspace.

    Attributes:
        data: The stored values.
        before: ‖Uᵀ(Q − T)V‖, Frobenius, with rounding to nearest alone.
        after: The same of ``data``; never more.
        rounds: How many corrections were made, a count.
    """

    data: torch.Tensor
    before: float
    after: float
    rounds: int


def fits(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite and round to finite ones of the store dtype."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    # NaN is neither below nor above anything.
    largest = max(-float(low), float(high)) if float(low) <= float(high) else math.nan
    return _fits(largest, dtype)


def _fits(largest: float, dtype: torch.dtype) -> bool:
    top = torch.finfo(dtype).max
    if largest <= top:
        return True
    # Up to half a step beyond the largest value rounds to it. At exactly half the even neighbour is taken, which lies
    # beyond the range; only in float8_e4m3fn the largest value is the even one (its odd neighbour means NaN).
    half = math.ldexp(torch.finfo(dtype).eps, math.frexp(top)[1] - 2)
    return largest < top + half or (largest == top + half and dtype == torch.float8_e4m3fn)


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values rounded to the nearest of a store dtype, ties to even; nothing is clamped.

    Args:
        values: float32 or float64, of any shape.
        dtype: The store dtype.

    Raises:
        NonFiniteError: A value is NaN, infinite, or beyond the dtype's range.
    """
    if not fits(values, dtype):
        raise _beyond(values, dtype)
    return values.to(dtype)


def stochastic(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """The values rounded at random to one of their two neighbours in a store dtype, each by its nearness.

    The expectation of the result is the value, to 2⁻²⁴ of the neighbours' distance. Values that the dtype has stay as
    they are, zeros with their sign.

    Args:
        values: float32 or float64, of any shape.
        dtype: The store dtype: float16, bfloat16, float8_e4m3fn, float8_e5m2; or one as wide as the values, which are
            then rounded to nearest.
        generator: On the values' device; it is advanced by one draw per value.

    Raises:
        NonFiniteError: A value is NaN, infinite, or above the dtype's largest, which has no upper neighbour.
    """
    if dtype.itemsize >= values.dtype.itemsize:
        return nearest(values, dtype)
    size = values.abs()
    if values.numel() and not float(size.max()) <= torch.finfo(dtype).max:
        raise _beyond(values, dtype)
    bits = values.to(dtype).view(_PATTERNS[dtype.itemsize])
    bits -= (bits.view(dtype).to(values.dtype).abs() > size).to(bits.dtype)
    below = bits.view(dtype).to(values.dtype).abs()
    # Above the largest value the pattern means NaN or infinity: no draw is below the share that comes of it.
    above = (bits + 1).view(dtype).to(values.dtype).abs()
    share = size.sub_(below).div_(above.sub_(below))
    draws = torch.rand(values.shape, generator=generator, dtype=values.dtype, device=values.device)
    bits += (draws < share).to(bits.dtype)
    return bits.view(dtype)


def compensated(
    target: torch.Tensor,
    dtype: torch.dtype,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    rounds: int = ROUNDS,
    scale: torch.Tensor | None = None,
) -> Compensated:
    """A matrix rounded to nearest after a small correction within a subspace, so that no rounding error is left there.

    With Q the result and T the target, T + U·C·Vᵀ is rounded instead of T, and C is what makes Uᵀ(Q − T)V vanish:
    C ← C − 0.82ᵏ · Uᵀ(Q − T)V in round k. A correction that is small beside the distance of neighbouring values moves
    the rounding of few entries only, but by its own size on the average. Of matrices of random numbers a thirtieth is
    left at 1280 x 1280 and rank 32, an eighth at 320 x 320: the fewer entries there are per direction, the coarser
    are the steps. It ends after ``rounds``, or when a thousandth is left; the best round is returned, that without a
    correction among them.

    Args:
        target: T (out, in), float32 or float64.
        dtype: The store dtype.
        left: U (out, r), orthonormal columns, of T's dtype.
        right: V (in, r'), likewise.
        rounds: The most corrections, a count.
        scale: What stored values are multiplied by (float8), of a shape that broadcasts to T's; None for 1.

    Raises:
        NonFiniteError: A value is NaN, infinite, or beyond the dtype's range.
    """
    stored = nearest(target if scale is None else target / scale, dtype)
    gap = _gap(stored, target, left, right, scale)
    before = best = float(gap.norm())
    data, correction, done = stored, torch.zeros_like(gap), 0
    while done < rounds and best > _ENOUGH * before:
        correction.sub_(gap, alpha=_DAMPING**done)
        shifted = torch.addmm(target, left @ correction, right.T)
        if scale is not None:
            shifted /= scale
        if not fits(shifted, dtype):
            break
        done += 1
        stored = shifted.to(dtype)
        gap = _gap(stored, target, left, right, scale)
        size = float(gap.norm())
        if size < best:
            data, best = stored, size
    return Compensated(data, before, best, done)


def _gap(
    stored: torch.Tensor,
    target: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """Uᵀ(Q − T)V."""
    error = stored.to(target.dtype, copy=True)
    if scale is not None:
        error *= scale
    return left.T @ error.sub_(target) @ right


def _beyond(values: torch.Tensor, dtype: torch.dtype) -> NonFiniteError:
    name = str(dtype).removeprefix("torch.")
    finite = values[values.isfinite()]
    lost = values.numel() - finite.numel()
    if lost:
        return NonFiniteError(
            f"{lost} of {values.numel()} values are NaN or infinite", expected="Finite values were expected"
        )
    return NonFiniteError(
        f"the largest value is {float(finite.abs().max()):.6g}",
        expected=f"{name} holds values up to {torch.finfo(dtype).max:.6g}",
        todo="Choose a store dtype with a wider range, such as bfloat16 or float32",
    )
