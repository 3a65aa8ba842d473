"""Which stored tensors hold a target's rows: names by the architecture's tables, rows by counting.

A base in another dialect may have a fused weight in parts, parts of it as one, or its rows in another order; a table
says so in shares, and the stored shape says how many rows a share is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from loratools.archs._names import parse
from loratools.archs._table import DIFFUSERS, NATIVE, Table
from loratools.model import Rows, Target
from loratools.ops._changes import Span

_WHOLE = Rows(((0, 1),), 1)


class Held(NamedTuple):
    """A module of the base that holds some of a target's rows.

    Attributes:
        path: Its path in the base.
        rows: Which rows of the architecture's weight they are, or None for all.
    """

    path: str
    rows: Rows | None


def meaning(table: Table, path: str) -> tuple[str, Rows | None] | None:
    """The native path, and the rows of it, that a name of any dialect means; None where the table has none such.

    Args:
        table: A component's.
        path: Dotted or flattened.
    """
    if table.native(path) is not None:
        return path, None
    found = table.find(*parse(path))
    if found is None:
        return None
    name, numbers = found
    variants = (each.text % numbers for each in (name, *name.variants))
    if "." in path and path not in variants:
        return None
    return name.native % numbers, name.rows


def dialects(table: Table, modules: Iterable[str]) -> tuple[str, ...]:
    """The dialects in which a base may name its modules, the likeliest first.

    Args:
        table: A component's.
        modules: The base's paths.
    """
    order = (NATIVE, DIFFUSERS, *table.further)
    if not table.homonyms:
        return order
    # Names that mean different weights are read in the dialect of those that do not.
    spoken: Counter[str] = Counter()
    for path in modules:
        found = table.find(*parse(path))
        if found is not None and not found[0].homonyms and found[0].dialect is not None:
            spoken[found[0].dialect] += 1
    return tuple(sorted(order, key=lambda dialect: -spoken[dialect]))


def held(
    table: Table | None, modules: Container[str], target: Target, order: Sequence[str]
) -> list[Held] | None:
    """The modules of a base that hold a target's rows, or None if it lacks any of them.

    Args:
        table: The component's; None where paths are their own names.
        modules: The base's paths.
        target: With its native path.
        order: From :func:`dialects`.
    """
    path = target.path
    if table is None or table.native(path) is None:
        return [Held(path, None)] if path in modules else None
    for dialect in order:
        found: list[Held] = []
        for rows in table.pieces(path, dialect):
            if not overlap(rows, target.rows):
                continue
            name = table.spell(path, rows, dialect)
            if name is None or name not in modules:
                break
            found.append(Held(name, rows))
        else:
            if found:
                return found
    return None


def overlap(one: Rows | None, other: Rows | None) -> bool:
    """Whether two choices of rows of one weight have any in common."""
    if one is None or other is None:
        return True
    return any(
        start * other.of < last * one.of and first * one.of < stop * other.of
        for start, stop in one.spans
        for first, last in other.spans
    )


def spans(wanted: Rows | None, have: Rows | None, height: int) -> tuple[Span, ...] | None:
    """Which of a target's rows are which of a stored tensor's.

    Args:
        wanted: The target's rows of the architecture's weight, or None for all.
        have: The stored tensor's.
        height: How many rows are stored.

    Returns:
        In the order of the target's rows; None where the height is no whole number of shares.
    """
    wanted, have = wanted or _WHOLE, have or _WHOLE
    total, rest = divmod(height * have.of, have.shares)
    asked, stored = _intervals(wanted, total), _intervals(have, total)
    if rest or asked is None or stored is None:
        return None
    found: list[Span] = []
    begin = 0
    for first, last in asked:
        at = 0
        for start, stop in stored:
            low, high = max(first, start), min(last, stop)
            if low < high:
                found.append((begin + low - first, begin + high - first, at + low - start))
            at += stop - start
        begin += last - first
    return _joined(sorted(found))


def _intervals(rows: Rows, total: int) -> list[tuple[int, int]] | None:
    """Rows in numbers instead of shares; None where shares are no whole numbers of rows."""
    if any(edge * total % rows.of for span in rows.spans for edge in span):
        return None
    return [(start * total // rows.of, stop * total // rows.of) for start, stop in rows.spans]


def _joined(found: Sequence[Span]) -> tuple[Span, ...]:
    """Spans that follow each other on both sides as one."""
    joined: list[Span] = []
    for start, stop, at in found:
        if joined and joined[-1][1] == start and joined[-1][2] + start - joined[-1][0] == at:
            joined[-1] = (joined[-1][0], stop, joined[-1][2])
        else:
            joined.append((start, stop, at))
    return tuple(joined)
