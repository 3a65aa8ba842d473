"""Trimming by magnitude of a matrix that is only given as row tiles: exact, with ties broken by position.

Elements are ordered by descending magnitude, equal ones in row-major order; a :class:`Cut` keeps a beginning of that
order, a :class:`Band` a stretch of it.

The k-th largest magnitude is found between two values that a sample suggests (``_bracket``): a sweep for the sample
and one that counts and collects. Where that fails, as it does where very many elements are equal, it is found by
refining digits: the bit pattern of a non-negative float grows with its value, so a histogram of the leading bits over
one sweep tells in which bin it lies, and the next sweep looks only into that bin. As soon as a bin holds few enough
elements they are collected and sorted. No sweep holds more than one tile and that collection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loratools.errors import OptionError
from loratools.maths._bracket import bracketed
from loratools.maths.tiles import Sweep

_DIGIT = 16
_COLLECT = 1 << 20
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True, slots=True)
class Cut:
    """What trimming keeps: magnitudes above ``magnitude``, and those equal to it up to position ``last``.

    Attributes:
        magnitude: The smallest magnitude kept.
        last: The row-major index of the last element kept among those equal to ``magnitude``.
        alone: Whether no element equal to ``magnitude`` is known to follow that one, so that none need be looked for.
    """

    magnitude: float
    last: int
    alone: bool = False

    def kept(self, start: int, tile: torch.Tensor) -> torch.Tensor:
        """Which elements of the tile that begins at row ``start`` are kept, as a mask of its shape."""
        size = tile.abs().contiguous()
        above: torch.Tensor = size > self.magnitude
        first = start * tile.shape[1]
        if first > self.last:
            return above
        equal = size == self.magnitude
        if first + tile.numel() > self.last + 1:
            equal.view(-1)[self.last + 1 - first :] = False
        return above | equal

    def trimmed(self, start: int, tile: torch.Tensor) -> torch.Tensor:
        """The tile that begins at row ``start`` with zeros in place of what is not kept."""
        if not self.magnitude:
            return tile
        # One pass, where a mask and a choice by it are four.
        below = torch.tensor(self.magnitude, dtype=tile.dtype, device="cpu")
        below = torch.nextafter(below, torch.zeros_like(below))
        found = torch.nn.functional.hardshrink(tile.contiguous(), float(below))
        first = start * tile.shape[1]
        if not self.alone and first + tile.numel() > self.last + 1:
            rest = found.view(-1)[max(0, self.last + 1 - first) :]
            rest[rest.abs() == self.magnitude] = 0.0
        return found


@dataclass(frozen=True, slots=True)
class Band:
    """What is left between the largest magnitudes and the smallest.

    Attributes:
        reach: What is kept together with the largest.
        largest: The largest, which are not kept; None where there are none of them.
    """

    reach: Cut
    largest: Cut | None

    def kept(self, start: int, tile: torch.Tensor) -> torch.Tensor:
        """Which elements of the tile that begins at row ``start`` are kept, as a mask of its shape."""
        reached = self.reach.kept(start, tile)
        return reached if self.largest is None else reached & ~self.largest.kept(start, tile)

    def trimmed(self, start: int, tile: torch.Tensor) -> torch.Tensor:
        """The tile that begins at row ``start`` with zeros in place of what is not kept."""
        reached = self.reach.trimmed(start, tile)
        return reached if self.largest is None else reached - self.largest.trimmed(start, tile)


def kept_count(density: float, numel: int) -> int:
    """How many of ``numel`` elements a density keeps: density · numel rounded half up, at least one.

    Args:
        density: The fraction kept, in (0, 1].
        numel: A count.

    Raises:
        OptionError: The density lies outside (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise OptionError(f"density {density}", expected="The fraction kept lies in (0, 1]")
    return min(numel, max(1, math.floor(density * numel + 0.5)))


def magnitude_cut(sweep: Sweep, numel: int, density: float) -> Cut:
    """The cut that keeps exactly ``kept_count(density, numel)`` elements, the largest by magnitude.

    Among equal magnitudes the first in row-major order are kept. The result does not depend on how the rows
    are cut into tiles, as long as the values are the same in every sweep.

    Args:
        sweep: The matrix by rows, float32 or float64.
        numel: Its number of elements.
        density: The fraction kept, in (0, 1].

    Raises:
        NonFiniteError: The matrix holds NaN or Inf.
        OptionError: The density lies outside (0, 1].
    """
    return _cut(sweep, numel, kept_count(density, numel))


def band_cut(sweep: Sweep, numel: int, density: float, gamma: float) -> Band:
    """The band that keeps ``kept_count(density, numel)`` elements, the largest that follow the largest.

    Of the largest, gamma · numel (rounded half up) are not kept, or as many as the density leaves over.

    Args:
        sweep: The matrix by rows, float32 or float64.
        numel: Its number of elements.
        density: The fraction kept, in (0, 1].
        gamma: The fraction of the largest that is not, in [0, 1).

    Raises:
        NonFiniteError: The matrix holds NaN or Inf.
        OptionError: A fraction lies outside its range.
    """
    if not 0.0 <= gamma < 1.0:
        raise OptionError(
            f"gamma {gamma}", expected="The fraction of the largest that is removed lies in [0, 1)"
        )
    kept = kept_count(density, numel)
    removed = min(numel - kept, math.floor(gamma * numel + 0.5))
    return Band(_cut(sweep, numel, kept + removed), _cut(sweep, numel, removed) if removed else None)


def places_in_rows(tile: torch.Tensor) -> torch.Tensor:
    """The place of each element in its row by descending magnitude, 0 for the largest; equal ones as they come.

    Args:
        tile: (rows, columns).

    Returns:
        (rows, columns) int64, in every row each of 0 … columns − 1 once.
    """
    order = torch.sort(tile.abs(), dim=1, descending=True, stable=True).indices
    counted = torch.arange(tile.shape[1], device=tile.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, counted)


def _cut(sweep: Sweep, numel: int, count: int) -> Cut:
    """The cut that keeps ``count`` elements, at least one."""
    if count == numel:
        return Cut(0.0, numel - 1)
    found = bracketed(sweep, numel, count, _COLLECT)
    return _by_digits(sweep, count) if found is None else Cut(*found)


def _by_digits(sweep: Sweep, count: int) -> Cut:
    """The cut that keeps ``count`` elements of a finite matrix, whatever its values."""
    dtype = next(iter(sweep()))[1].dtype
    bin_, needed, shift = 0, count, torch.finfo(dtype).bits - 1
    while shift > 0:
        step = min(_DIGIT, shift)
        shift -= step
        histogram = _histogram(sweep, bin_, shift, step)
        digit, above = _digit_of(histogram, needed)
        bin_, needed = (bin_ << step) | digit, needed - above
        if int(histogram[digit]) <= _COLLECT:
            return _from_collection(sweep, bin_, shift, needed)
    return _nth_equal(sweep, bin_, needed)


def _patterns(sweep: Sweep) -> Iterator[tuple[int, torch.Tensor]]:
    """The flat bit patterns of every tile's magnitudes, with the index of the first."""
    for start, tile in sweep():
        yield start * tile.shape[1], tile.abs().contiguous().view(_INTEGERS[tile.dtype]).flatten()


def _histogram(sweep: Sweep, bin_: int, shift: int, step: int) -> torch.Tensor:
    """Counts of the ``step`` bits above ``shift``, of elements whose higher bits are ``bin_``."""
    counts = torch.zeros(1 << step, dtype=torch.int64, device="cpu")
    for _, bits in _patterns(sweep):
        digits = bits >> shift
        inside = digits[(digits >> step) == bin_]
        counts += torch.bincount(inside & ((1 << step) - 1), minlength=1 << step).cpu()
    return counts


def _digit_of(histogram: torch.Tensor, needed: int) -> tuple[int, int]:
    """The bin that holds the ``needed``-th largest, and how many elements lie in higher bins."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, needed))
    above = int(from_top[place - 1]) if place else 0
    return histogram.numel() - 1 - place, above


def _from_collection(sweep: Sweep, bin_: int, shift: int, needed: int) -> Cut:
    """The ``needed``-th largest of the elements in one bin, sorted by magnitude and then by position."""
    values, places = [], []
    for first, bits in _patterns(sweep):
        inside = ((bits >> shift) == bin_).nonzero().flatten()
        values.append(bits[inside])
        places.append(inside + first)
    value, place = torch.cat(values), torch.cat(places)
    order = torch.sort(value, descending=True, stable=True).indices
    chosen = order[needed - 1]
    return Cut(_magnitude(value[chosen]), int(place[chosen]))


def _nth_equal(sweep: Sweep, pattern: int, needed: int) -> Cut:
    """The ``needed``-th element, by position, of very many with one bit pattern."""
    for first, bits in _patterns(sweep):
        equal = (bits == pattern).nonzero().flatten()
        if equal.numel() >= needed:
            chosen = equal[needed - 1]
            return Cut(_magnitude(bits[chosen]), int(chosen) + first)
        needed -= equal.numel()
    raise AssertionError("a sweep gave other values than the one before")


def _magnitude(bits: torch.Tensor) -> float:
    """The float that a bit pattern stands for."""
    return float(bits.view(torch.float32 if bits.dtype == torch.int32 else torch.float64))
