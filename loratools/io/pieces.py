"""Ranges of files that go into another, in pieces of which each is a task of its own: copied, or found to be there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from loratools.io.regions import copy_range, opened, read_at

PIECE = 256 << 20  # bytes of a piece at most: what is lost where a run is interrupted in the middle of one
_COMPARED = 4 << 20  # bytes that are compared at a time

Step = Callable[[int], None]


class Range(NamedTuple):
    """Bytes of a file, and their place in another.

    Attributes:
        path: The file they are in.
        start: Offset of the first.
        stop: Offset behind the last.
        at: Offset of the first in the output.
    """

    path: str
    start: int
    stop: int
    at: int

    @property
    def size(self) -> int:
        """A count of bytes."""
        return self.stop - self.start


class Piece(NamedTuple):
    """Ranges that are copied together.

    Attributes:
        name: The same in every run of the same output: its first and last place there.
        ranges: In the order of their places.
    """

    name: str
    ranges: tuple[Range, ...]

    @property
    def size(self) -> int:
        """A count of bytes."""
        return sum(each.size for each in self.ranges)


def gaps(path: str, size: int, taken: Sequence[tuple[int, int]]) -> list[Range]:
    """What of a file lies in none of the ranges ``taken``, (start, stop) in any order, to stay where it is."""
    found = []
    at = 0
    for start, stop in sorted(taken):
        if start > at:
            found.append(Range(path, at, start, at))
        at = max(at, stop)
    if at < size:
        found.append(Range(path, at, size, at))
    return found


def joined(ranges: Sequence[Range]) -> list[Range]:
    """The same with those made one that follow each other in both files, and empty ones left out."""
    found: list[Range] = []
    for item in ranges:
        if item.start == item.stop:
            continue
        if found:
            last = found[-1]
            if (item.path, item.start, item.at) == (last.path, last.stop, last.at + last.size):
                found[-1] = last._replace(stop=item.stop)
                continue
        found.append(item)
    return found


def cut(ranges: Sequence[Range], most: int = PIECE) -> list[Piece]:
    """The ranges in pieces of at most so many bytes; small ones that follow each other go together."""
    groups: list[list[Range]] = []
    filled = most
    for part in _parts(ranges, most):
        if filled + part.size > most:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.size
    return [Piece(f"bytes {group[0].at}-{group[-1].at + group[-1].size}", tuple(group)) for group in groups]


def copy(piece: Piece, target: int, step: Step | None = None) -> int:
    """Copy a piece into an open file.

    Args:
        piece: What to copy.
        target: The output's descriptor.
        step: Called after each chunk with its size in bytes; what it raises ends the copying.

    Returns:
        Bytes that were copied.

    Raises:
        MalformedFileError: A source ends too early.
        OSError: The system refuses.
    """
    for path, source, ranges in _sources(piece):
        for part in ranges:
            copy_range(source, target, part.start, part.stop, part.at, path=path, step=step)
    return piece.size


def restore(piece: Piece, target: int, step: Step | None = None) -> int:
    """Have a piece in an open file that should hold it already: only what differs is copied.

    Comparing reads twice what copying reads once and writes: a disk that is read faster than written, or whose files
    the system still holds in memory, is done in a fraction of the time.

    Returns:
        Bytes that were copied.

    Raises:
        MalformedFileError: A source ends too early.
        OSError: The system refuses.
    """
    copied = 0
    for path, source, ranges in _sources(piece):
        for part in _parts(ranges, _COMPARED):
            if not _equal(path, source, target, part):
                copy_range(source, target, part.start, part.stop, part.at, path=path)
                copied += part.size
            if step is not None:
                step(part.size)
    return copied


def _parts(ranges: Sequence[Range], most: int) -> Iterator[Range]:
    for path, start, stop, at in ranges:
        for first in range(start, stop, most):
            yield Range(path, first, min(first + most, stop), at + first - start)


def _sources(piece: Piece) -> Iterator[tuple[str, int | str, list[Range]]]:
    """Each source, open for as long as it is looked at."""
    for path, ranges in groupby(piece.ranges, key=attrgetter("path")):
        with opened(path) as source:
            yield path, source, list(ranges)


def _equal(path: str, source: int | str, target: int, part: Range) -> bool:
    if part.at + part.size > os.fstat(target).st_size:
        return False
    # As bytearrays: of those, the C library compares many bytes at a time.
    one, other = bytearray(part.size), bytearray(part.size)
    read_at(target, part.at, one)
    read_at(source, part.start, other, path=path)
    return one == other
