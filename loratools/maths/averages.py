"""Averages over a sequence that favour its end, as the contribution of each member.

Karras and others: "Analyzing and improving the training dynamics of diffusion models", arXiv 2312.02696, for averages
whose profile is a power of the time: they are the same however long the sequence is, and forget its beginning.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loratools.errors import OptionError

Float64 = NDArray[np.float64]

WIDEST = 12.0**-0.5
"""σ_rel of the uniform average, the widest that does not favour the beginning."""


def moving_average(count: int, beta: float) -> Float64:
    """What each of ``count`` values contributes to a moving average: (count,), of sum 1.

    That is to m ← β·m + (1 − β)·xᵢ, which begins with m = x₁.

    Args:
        count: At least 1.
        beta: The share that the past keeps, in [0, 1).
    """
    age = np.arange(count - 1, -1, -1, dtype=np.float64)
    found: Float64 = (1.0 - beta) * np.power(beta, age)
    found[0] = beta ** (count - 1)
    return found


def power_average(count: int, width: float) -> Float64:
    """What each of ``count`` values contributes to a power-function average: (count,), of sum 1.

    That is to m ← βᵢ·m + (1 − βᵢ)·xᵢ with βᵢ = (1 − 1/i)^(γ + 1), where the first value enters whole, β₁ being 0. The
    i-th of T contributes (i/T)^(γ + 1) − ((i − 1)/T)^(γ + 1), the share of t^γ over the i-th of T equal spans.

    Args:
        count: At least 1.
        width: σ_rel of the power function, in (0, 1/√12]; see :func:`exponent_of`.
    """
    until = np.power(np.arange(count + 1, dtype=np.float64) / count, exponent_of(width) + 1.0)
    return np.diff(until)


def exponent_of(width: float) -> float:
    """γ ≥ 0 of the power function t^γ on [0, 1] whose standard deviation is ``width``.

    σ_rel = √(γ + 1) / ((γ + 2)·√(γ + 3)) falls from 1/√12 at γ = 0, the uniform average.

    Args:
        width: σ_rel, in (0, 1/√12].

    Raises:
        OptionError: The width lies outside that range.
    """
    if not 0.0 < width <= WIDEST:
        raise OptionError(
            f"width {width}",
            expected="The relative width of a power-function average lies in (0, 1/√12], which is 0.2886 and more",
            todo="Pass 0.2886 for the nearly uniform average, or less to favour the last",
        )
    inverse = width**-2.0
    # (γ + 2)²·(γ + 3) = (γ + 1) / σ_rel², whose largest root is the one that is not negative.
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots.real.max()))
