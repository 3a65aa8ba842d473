"""The k-th largest magnitude in one pass over a matrix, between two values that a sample suggests.

A sample of the magnitudes tells two values that the k-th largest lies between but for bad luck. One pass then counts
what is larger and collects what lies between, among which it is found exactly. Whether the guess was right is known
from the counts, so that the sample decides how fast the answer comes and never what it is. Floyd, Rivest: "Expected
time bounds for selection", CACM 18, 1975.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from loratools.errors import NonFiniteError
from loratools.maths.tiles import Sweep

# Of the sample's standard deviations of a rank, on either side of the one that is looked for.
_MARGIN = 5.0


class Found(NamedTuple):
    """The k-th largest in the order of descending magnitudes and, among equal ones, of positions.

    Attributes:
        magnitude: Its magnitude.
        place: Its row-major index.
        alone: Whether no element of the same magnitude follows.
    """

    magnitude: float
    place: int
    alone: bool


def bracketed(sweep: Sweep, numel: int, count: int, most: int) -> Found | None:
    """The ``count``-th largest magnitude, or None where the sample misjudged it or too many elements are like it.

    Args:
        sweep: The matrix by rows, float32 or float64.
        numel: Its number of elements.
        count: In [1, numel].
        most: How many elements may be collected, a count.

    Raises:
        NonFiniteError: The matrix holds NaN or Inf.
    """
    low, high = _bracket(sample(sweep, numel), count / numel)
    above, values, places, collected = 0, [], [], 0
    for start, tile in sweep():
        size = tile.abs().flatten()
        _check_finite(size)
        larger = size > high
        above += int(torch.count_nonzero(larger))
        inside = (larger ^ (size >= low)).nonzero().flatten()
        collected += inside.numel()
        if above >= count or collected > most:
            return None
        values.append(size[inside])
        places.append(inside + start * tile.shape[1])
    if above + collected < count:
        return None
    return _nth(torch.cat(values), torch.cat(places), count - above)


def sample(sweep: Sweep, numel: int) -> torch.Tensor:
    """About numel^⅔ magnitudes at even distances: as much to sort out as its margin then leaves to collect."""
    pieces = []
    for start, tile in sweep():
        step = _step(numel, tile.shape[1])
        pieces.append(tile.flatten()[-start * tile.shape[1] % step :: step].abs())
    return torch.cat(pieces)


def _step(numel: int, width: int) -> int:
    """A distance that meets all columns: with a divisor in common with their number it would meet a few of them."""
    step = max(1, round(math.pow(numel, 1 / 3)))
    while math.gcd(step, width) > 1:
        step += 1
    return step


def _bracket(drawn: torch.Tensor, share: float) -> tuple[float, float]:
    """Two magnitudes, the smaller one first, between which that of a rank lies with near certainty.

    Args:
        drawn: (n,) magnitudes, at least one.
        share: The rank as a fraction of all, counted from the largest.
    """
    size = drawn.numel()
    margin = _MARGIN * math.sqrt(size * share * (1.0 - share)) + 1.0
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    # torch counts from the smallest.
    high = float(drawn.kthvalue(size + 1 - first).values) if first >= 1 else math.inf
    low = float(drawn.kthvalue(size + 1 - last).values) if last <= size else 0.0
    return low, high


def _check_finite(size: torch.Tensor) -> None:
    """Refuse magnitudes (n,) that are not finite.

    Raises:
        NonFiniteError: One is not.
    """
    if size.numel() and not math.isfinite(float(size.max())):
        raise NonFiniteError(
            "a matrix to be trimmed holds NaN or Inf", expected="Finite factors were expected"
        )


def _nth(values: torch.Tensor, places: torch.Tensor, needed: int) -> Found:
    """The ``needed``-th of magnitudes whose places ascend."""
    value = values.kthvalue(values.numel() + 1 - needed).values
    equal = places[values == value]
    position = needed - int(torch.count_nonzero(values > value))
    return Found(float(value), int(equal[position - 1]), position == equal.numel())
