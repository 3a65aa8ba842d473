"""The tensor entries of a safetensors header: what each must say, and what they must cover together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from loratools.errors import MalformedFileError
from loratools.io.json_text import brief
from loratools.tensors import DTYPES

AGAIN = "Download the file again, or ask its author to save it again"
"""What to do about a damaged file."""

_FIELDS = {"dtype", "shape", "data_offsets"}
_MOST_ELEMENTS = 2**63
_BITS = {name: row.bits for name, row in DTYPES.items()}
_PLAIN = 2**32  # a product of a few such dimensions cannot take long
_MOST_DIMS = 64  # numpy's limit; without one, a hostile shape takes hours to multiply


class Entry(NamedTuple):
    """One tensor's line in a header; offsets in bytes, relative to ``Header.data_start``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _BrokenEntryError(ValueError):
    """What is wrong with one entry; collected over the header before anything is raised."""


def read_entries(table: Mapping[str, Any], path: str) -> dict[str, Entry]:
    """The entries of a header's JSON, each checked by itself, in order.

    Raises:
        MalformedFileError: Some entry contradicts itself; names every such tensor.
    """
    entries: dict[str, Entry] = {}
    problems: dict[str, str] = {}
    for name, value in table.items():
        entry = _regular(value)
        if entry is not None:
            entries[name] = entry
            continue
        try:
            entries[name] = _entry(value)
        except _BrokenEntryError as error:
            problems[name] = str(error)
    if problems:
        count = len(problems)
        raise MalformedFileError(
            ("a broken header entry: " if count == 1 else f"{count:,} broken header entries, the first: ")
            + next(iter(problems.values())),
            path=path,
            keys=problems,
            expected="An entry has dtype, shape and data_offsets, which agree with each other",
            todo=AGAIN,
        )
    return entries


def _regular(value: Any) -> Entry | None:
    """An entry that is beyond doubt, or None where it takes a closer look: most of a header's time is spent here."""
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        bits = _BITS[dtype]
        for dim in shape:
            if type(dim) is not int or not 0 < dim < _PLAIN:
                return None
            bits *= dim
        plain = type(shape) is list and len(shape) < 8 and type(start) is int and type(stop) is int
        if plain and start >= 0 and len(value) == 3 and bits == 8 * (stop - start):
            return Entry(dtype, tuple(shape), start, stop)
    except (TypeError, ValueError, KeyError):
        pass
    return None


def _entry(value: Any) -> Entry:
    if type(value) is not dict or value.keys() != _FIELDS:
        has = brief(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise _BrokenEntryError(f"its fields are {has}, not {sorted(_FIELDS)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise _BrokenEntryError(f"unknown dtype {brief(dtype)}")
    if type(shape) is not list:
        raise _BrokenEntryError(f"shape {_short(shape)} is not a list of whole numbers")
    if len(shape) > _MOST_DIMS:
        raise _BrokenEntryError(f"a shape of {len(shape):,} dimensions")
    span = 1  # the count of elements, but for dimensions of 0, which must not hide absurd ones
    for dim in shape:
        # Exact types, because JSON's true is an int to isinstance.
        if type(dim) is not int or dim < 0:
            raise _BrokenEntryError(f"shape {_short(shape)} is not a list of whole numbers")
        span *= dim or 1
    if span > _MOST_ELEMENTS:
        raise _BrokenEntryError(f"shape {_short(shape)} has more elements than can be addressed")
    if type(offsets) is not list or [type(at) for at in offsets] != [int, int]:
        raise _BrokenEntryError(f"data_offsets {_short(offsets)} are not two whole numbers")
    start, stop = offsets
    if not 0 <= start <= stop:
        raise _BrokenEntryError(f"data_offsets {_short(offsets)} do not rise from 0")
    bits = 0 if 0 in shape else span * DTYPES[dtype].bits
    if bits != 8 * (stop - start):
        raise _BrokenEntryError(
            f"{dtype} of shape {_short(shape)} takes {bits / 8:,g} bytes, but its data_offsets span {stop - start:,}"
        )
    return Entry(dtype, tuple(shape), start, stop)


def check_cover(entries: Mapping[str, Entry], length: int, path: str) -> None:
    """Refuse entries that do not cover ``length`` bytes of data exactly once.

    Raises:
        MalformedFileError: Truncated data, overlapping tensors, holes, or data beyond the last tensor.
    """
    end = 0
    for entry in entries.values():
        if entry.start != end:
            break
        end = entry.stop
    else:
        if end == length:
            return  # in order and without holes, as nearly every file is
    ordered = sorted(entries.items(), key=lambda item: item[1][2:])
    needed = max((entry.stop for _, entry in ordered), default=0)
    if needed > length:
        raise MalformedFileError(
            f"the file is truncated: {needed - length:,} of {needed:,} bytes of data are missing",
            path=path,
            keys=[name for name, entry in ordered if entry.stop > length],
            todo=AGAIN,
        )
    end = 0
    for name, entry in ordered:
        if entry.start != end:
            problem = (
                "data overlaps that of another tensor" if entry.start < end else "a hole before the data"
            )
            raise MalformedFileError(
                f"{problem}: offset {entry.start:,} where {end:,} was expected",
                path=path,
                keys=[name],
                expected="Tensors follow each other without holes",
                todo=AGAIN,
            )
        end = entry.stop
    if end != length:
        raise MalformedFileError(
            f"{length - end:,} bytes follow the last tensor",
            path=path,
            expected="The file ends with its last tensor",
            todo=AGAIN,
        )


def _short(value: object) -> str:
    """A value as the header spells it, of at most a line."""
    try:
        text = json.dumps(value)
    except (
        ValueError,
        RecursionError,
    ):  # an integer of more digits than Python prints, lists in lists in lists
        return brief(value)
    return text if len(text) <= 80 else text[:77] + "..."
