"""Which rank is enough: for one matrix by a rule, for many within a budget of bytes.

Singular values σ are always given in descending order, and energy is ‖D‖_F² = Σσ² over all of them, known or not.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loratools.errors import OptionError

Float64 = NDArray[np.float64]

_KINDS = ("rank", "energy", "ratio", "error")
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power
# What sums of squares are off by; a sum that falls short of its share by less has reached it.
_ROUNDING = 4 * float(np.finfo(np.float64).eps)


class Rule(NamedTuple):
    """How many singular values to keep.

    Attributes:
        kind: "rank": ``value`` of them. "energy": the fewest with Σσ² ≥ value·‖D‖_F². "error": the fewest with
            ‖D − D_k‖_F ≤ value·‖D‖_F. "ratio": those that are not small against the first; a value up to 1 is a
            fraction, σ ≥ value·σ₁ (LyCORIS takes >), one above 1 a divisor, σ ≥ σ₁/value (sd-scripts' sv_ratio).
            Unlike sd-scripts, which keeps one more than each of its rules asks for, exactly these are kept.
        value: A count, or a fraction as above.
        least: The fewest that are kept, a count, where the matrix has as many.
        most: The most that are kept, a count; None for no limit.
    """

    kind: str
    value: float
    least: int = 1
    most: int | None = None


def check_rule(rule: Rule) -> None:
    """Refuse a rule that has no meaning.

    Raises:
        OptionError: An unknown kind, or a value or limits out of range.
    """
    kind, value = rule.kind, rule.value
    if kind not in _KINDS:
        raise OptionError(
            f"no rank rule is called {kind!r}", expected=f"One of {', '.join(_KINDS)} was expected"
        )
    if kind == "rank" and not (value >= 1 and value == int(value)):
        raise OptionError(f"rank {value:g}", expected="A rank is a whole number of at least 1")
    if kind in ("energy", "error") and not 0.0 < value <= 1.0:
        raise OptionError(
            f"{kind} {value:g}", expected=f"A fraction of the whole {kind}, in (0, 1], was expected"
        )
    if kind == "ratio" and not (value > 0.0 and math.isfinite(value)):
        raise OptionError(
            f"ratio {value:g}", expected="A fraction of the largest σ, or a divisor above 1, was expected"
        )
    if rule.least < 1 or (rule.most is not None and rule.most < rule.least):
        raise OptionError(
            f"at least {rule.least} and at most {rule.most} singular values",
            expected="Limits of at least 1, the lower one first, were expected",
        )


def needed(rule: Rule, sigma: Float64, energy: float, full: int) -> int | None:
    """The smallest rank that satisfies a rule, as far as the known singular values can tell.

    Args:
        rule: A sound one (see ``check_rule``).
        sigma: (known,) the largest ones.
        energy: ‖D‖_F².
        full: min(out, in), beyond which there are none.

    Returns:
        A count from 0 (of a zero matrix alone) to ``full``, or None where more singular values have to be known.
    """
    limit = full if rule.most is None else min(full, rule.most)
    known = int(sigma.size)
    if rule.kind == "rank":
        found: int | None = int(rule.value)
    elif known and sigma[0] == 0.0:
        found = 0
    elif rule.kind == "ratio":
        found = _above(rule.value, sigma)
    else:
        found = _enough(rule, sigma, energy, full)
    if found is None:
        found = limit if known >= limit else None
    if found is None:
        return None
    kept = min(max(found, rule.least), limit)
    if known < min(kept, limit):
        return None
    return min(kept, int(np.count_nonzero(sigma)))


def allocate(
    spectra: Sequence[Float64], costs: Sequence[int], budget: int, least: int = 1, most: int | None = None
) -> list[int]:
    """The rank of every module, so that the lost Σσ² of all together is small within a budget of bytes.

    Singular values are taken in the order of σ² per byte, the greatest gain first, until the next does not fit;
    smaller ones of cheaper modules may still do so. Each module's σ descend, so no value is taken before a larger
    one of the same module. Where all costs are equal this is the optimum. Otherwise it is the greedy solution of a
    knapsack: what is lost exceeds the least possible by at most one further value, the first that did not fit,
    since with it the energy kept would be that of the relaxed problem, in which values may be cut.

    Args:
        spectra: Singular values per module, as many as are known.
        costs: Bytes of one more rank, per module; at least 1.
        budget: Bytes for all of them.
        least: The fewest of each module, a count, where it has as many; paid for before anything else.
        most: The most of each module, a count; None for no limit.

    Raises:
        OptionError: The budget does not hold the least ranks.
    """
    limits = [_nonzero(sigma) if most is None else min(_nonzero(sigma), most) for sigma in spectra]
    ranks = [min(least, limit) for limit in limits]
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    if left < 0:
        raise OptionError(
            f"rank {least} of every module takes {budget - left} bytes, and {budget} are allowed",
            expected="A size that holds the least ranks was expected",
            todo="Ask for a larger size, or for fewer modules",
        )
    # Modules come back with their next value while their values fit; one that does not fit never will.
    gains = [
        _gain(spectra, costs, index, ranks[index])
        for index, limit in enumerate(limits)
        if ranks[index] < limit
    ]
    heapq.heapify(gains)
    while gains:
        index = gains[0][1]
        if costs[index] > left:
            heapq.heappop(gains)
            continue
        left -= costs[index]
        ranks[index] += 1
        if ranks[index] < limits[index]:
            heapq.heapreplace(gains, _gain(spectra, costs, index, ranks[index]))
        else:
            heapq.heappop(gains)
    return ranks


def parse_size(text: str) -> int:
    """Bytes from "20MB" (10⁶), "20 MiB" (2²⁰), "1.5GB" or a plain number of bytes; upper and lower case alike.

    Raises:
        OptionError: It is no size, or less than a byte.
    """
    plain = text.strip()
    digits = plain.rstrip("BKMGTIbkmgti ")
    unit = plain[len(digits) :].strip().upper()
    try:
        size = float(digits) * _UNITS[unit]
    except (ValueError, KeyError):
        size = 0.0
    if not (math.isfinite(size) and size >= 1):
        raise OptionError(
            f"{text!r} is no size",
            expected="A number of bytes with a unit was expected, such as 20MB or 20MiB",
        )
    return int(size)


def _above(value: float, sigma: Float64) -> int | None:
    """How many σ are at least a share of the first; None where all that are known are."""
    if not sigma.size:
        return None
    share = value if value <= 1.0 else 1.0 / value
    count = int(np.count_nonzero(sigma >= share * sigma[0]))
    return count if count < sigma.size else None


def _enough(rule: Rule, sigma: Float64, energy: float, full: int) -> int | None:
    """The fewest σ that hold the energy asked for; None where those known do not."""
    if energy == 0.0:
        return 0
    squares = np.square(sigma)
    if rule.kind == "error" and sigma.size >= full:
        # Added up from the smallest: as energy minus what is kept, nothing below 1e-16 of it could be told apart, and
        # that is an error of 1e-8.
        beyond = energy - float(squares.sum())
        lost = np.append(np.cumsum(squares[:0:-1])[::-1], 0.0) + (beyond > _ROUNDING * energy) * beyond
        enough = lost <= energy * rule.value**2 * (1.0 + _ROUNDING)
    else:
        share = rule.value if rule.kind == "energy" else 1.0 - rule.value**2
        enough = np.cumsum(squares) >= energy * (share - _ROUNDING)
    reached = np.flatnonzero(enough)
    return int(reached[0]) + 1 if reached.size else None


def _nonzero(sigma: Float64) -> int:
    return int(np.count_nonzero(sigma))


def _gain(spectra: Sequence[Float64], costs: Sequence[Any], index: int, rank: int) -> tuple[float, int]:
    """What the next rank of a module keeps per byte, negative for the heap; ties go to the earlier module."""
    return -(float(spectra[index][rank]) ** 2) / costs[index], index
