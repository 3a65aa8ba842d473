"""What the reports of baking, extracting and verifying have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from loratools.report import values
from loratools.report.table_text import short_paths
from loratools.report.tables import Column, table, wrapped
from loratools.report.values import Symbols, clean

if TYPE_CHECKING:
    from loratools.ops.prediction_results import Estimate

_KEYS_SHOWN = 5


def share(fraction: float | None) -> str:
    """How much of a change there is: as a percentage, and whatever is more than all, or the opposite, as it is."""
    if fraction is None:
        return ""
    if not math.isfinite(fraction):
        return str(fraction)
    # What a store dtype adds by chance is no more than all.
    if 1.0 < fraction < 1.0005:
        return "100%"
    if 0.0 <= fraction <= 1.0:
        return values.percentage(fraction)
    return f"{fraction * 100:.1f}%".replace("-0.0%", "0.0%")


def error(fraction: float | None) -> str:
    """A relative error as a percentage, never rounded to nothing."""
    if fraction is None:
        return ""
    if fraction == 0.0 or not math.isfinite(fraction):
        return "0%" if fraction == 0.0 else str(fraction)
    percent = fraction * 100
    return f"{percent:.0e}%" if percent < 5e-4 else f"{percent:.3g}%"


def duration(seconds: float) -> str:
    """``0.4 s``, ``12.3 s``, ``2 min 05 s``, ``1 h 02 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def prediction(estimate: Estimate | None) -> Iterator[tuple[str, str]]:
    """What a run would take: time, memory and bytes; nothing where it was not estimated."""
    if estimate is None:
        return
    yield "time", f"about {duration(estimate.seconds)} with {values.plural(estimate.workers, 'worker')}"
    together = f"; {values.size(estimate.peak)} in all" if estimate.workers > 1 else ""
    yield "memory", f"{values.size(estimate.memory)} for a worker{together}"
    yield "reads", _moved(estimate.read, estimate.read_rate)
    yield "writes", _moved(estimate.written, estimate.write_rate)


def _moved(size: int, rate: float | None) -> str:
    return values.size(size) + ("" if rate is None else f", at {values.size(round(rate))}/s")


def adapters(
    paths: Sequence[str],
    weights: Sequence[float],
    *,
    width: int,
    symbols: Symbols,
    counts: Mapping[str, Sequence[int]] | None = None,
) -> RenderableType:
    """The adapters with what each was multiplied by.

    Args:
        paths: Of the adapters.
        weights: One for each.
        width: Of the output, in cells.
        symbols: What the output can show.
        counts: Further columns by heading; one of zeros alone is left out.
    """
    columns = [
        Column("adapter", [clean(path) for path in short_paths(paths)], fold=24),
        Column("weight", [values.number(weight) for weight in weights], right=True),
    ]
    for priority, (head, numbers) in enumerate((counts or {}).items(), 1):
        if any(numbers):
            columns.append(Column(head, [f"{each:,}" for each in numbers], right=True, priority=priority))
    return table(columns, width=width, symbols=symbols)


def missing(paths: Sequence[str], keys: Sequence[Sequence[str]]) -> Iterator[str]:
    """By adapter, what the base has no place for: ``style: 12 modules (first, second and 10 more)``."""
    several = len(paths) > 1
    for path, left in zip(short_paths(paths), keys, strict=False):
        if left:
            name = f"{clean(path)}: " if several else ""
            yield f"{name}{values.plural(len(left), 'module')} ({names(left)})"


def names(keys: Sequence[str]) -> str:
    """The first few, and the count of the others."""
    more = f" and {len(keys) - _KEYS_SHOWN:,} more" if len(keys) > _KEYS_SHOWN else ""
    return ", ".join(clean(key) for key in keys[:_KEYS_SHOWN]) + more


def notes(found: Iterable[str], width: int) -> list[RenderableType]:
    """What the reader should know, one paragraph each."""
    return [
        Padding(Text(wrapped(f"Note: {clean(note)}", width - 1), style="yellow"), (0, 0, 0, 1), expand=False)
        for note in found
    ]
