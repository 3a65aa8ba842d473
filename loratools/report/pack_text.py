"""A pack, as a person reads it: what is in it, which adapters are one, and what does not fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from loratools.report import checkpoint_parts, values
from loratools.report.tables import Column, pairs, table, wrapped
from loratools.report.values import Symbols, clean

if TYPE_CHECKING:
    from loratools.ops.pack_results import Packed, PackReport, Unfit, UnpackReport

_SHOWN = 10


def pack_text(report: PackReport, *, width: int, symbols: Symbols, dry_run: bool = False) -> RenderableType:
    """What packing did, or would do.

    Args:
        report: From the operation.
        width: Of the output, in cells.
        symbols: What the output can show.
        dry_run: Whether nothing was written.
    """
    parts: list[RenderableType] = [pairs(_facts(report, symbols, dry_run), width=width)]
    if report.shared:
        parts.append(_errors(report.adapters, width, symbols))
    parts += [
        _line(f"Same: {clean(each.name)} is {clean(each.of)}", width, "dim")
        for each in report.aliases[:_SHOWN]
    ]
    parts += _more(len(report.aliases), "duplicate", width)
    parts += [_unfit(each, width) for each in report.unfit[:_SHOWN]]
    parts += _more(len(report.unfit), "input", width)
    parts += [_line(f"Note: {clean(note)}", width, "yellow") for note in report.notes]
    return Group(*parts)


def unpack_text(
    report: UnpackReport, *, width: int, symbols: Symbols, dry_run: bool = False
) -> RenderableType:
    """What unpacking did, or would do.

    Args:
        report: From the operation.
        width: Of the output, in cells.
        symbols: What the output can show.
        dry_run: Whether nothing was written.
    """
    would = "would be " if dry_run else ""
    ranks = Counter(each.rank for each in report.adapters)
    rows = [
        ("from", clean(report.pack)),
        ("to", f"{clean(report.output)} ({would}written, {values.size(report.bytes)})"),
        ("adapters", f"{len(report.adapters):,} in the {report.layout} layout"),
        ("ranks", values.ranks(dict(sorted(ranks.items())), symbols)),
    ]
    return pairs(rows, width=width)


def _facts(report: PackReport, symbols: Symbols, dry_run: bool) -> Iterator[tuple[str, str]]:
    said = "would be written, " if dry_run else ""
    yield "to", f"{clean(report.output)} ({said}{values.size(report.bytes)})"
    served = f", checked for {report.runtime}" if report.runtime else ""
    count = len(report.adapters)
    reused = f", {report.reused:,} of them from before" if report.reused else ""
    yield "adapters", f"{count:,} in the {report.layout} layout{served}{reused}"
    if report.aliases:
        yield "duplicates", f"{len(report.aliases):,} left out; their names are in the index"
    if report.unfit:
        yield "left out", f"{len(report.unfit):,} that do not fit"
    ranks = Counter(each.bucket for each in report.adapters)
    yield "ranks", values.ranks(dict(sorted(ranks.items())), symbols)
    yield "dtypes", values.counts(dict(Counter(each.dtype for each in report.adapters)), symbols)
    if report.shared:
        yield "basis", f"{len(report.shared):,} modules, at most rank {max(p.rank for p in report.shared)}"
        yield "error", _spread([each.error or 0.0 for each in report.adapters])
    yield from checkpoint_parts.prediction(report.estimate)


def _spread(errors: Sequence[float]) -> str:
    mean = math.sqrt(sum(error * error for error in errors) / len(errors))
    return f"{values.percentage(mean)} of ΔW (root mean square), at most {values.percentage(max(errors))}"


def _errors(adapters: Sequence[Packed], width: int, symbols: Symbols) -> RenderableType:
    """The adapters that a shared basis serves worst."""
    worst = sorted(adapters, key=lambda each: -(each.error or 0.0))[:_SHOWN]
    modules = [max(each.errors, key=each.errors.__getitem__, default="") for each in worst]
    columns = [
        Column("adapter", [clean(each.name) for each in worst], fold=20),
        Column("error", [values.percentage(each.error) for each in worst], right=True),
        Column("worst module", [clean(name) for name in modules], priority=2),
        Column(
            "its error",
            [values.percentage(each.errors.get(name)) for each, name in zip(worst, modules, strict=True)],
            right=True,
            priority=1,
        ),
    ]
    return table(columns, width=width, symbols=symbols, title="‖ΔW − ΔW'‖ / ‖ΔW‖, the largest first")


def _unfit(each: Unfit, width: int) -> RenderableType:
    return _line(f"Left out: {clean(each.name)}: {clean('; '.join(each.causes))}", width, "red")


def _more(count: int, word: str, width: int) -> list[RenderableType]:
    rest = count - _SHOWN
    return [_line(f"and {values.plural(rest, f'more {word}')}", width, "dim")] if rest > 0 else []


def _line(text: str, width: int, style: str) -> RenderableType:
    return Padding(Text(wrapped(text, width - 1), style=style), (0, 0, 0, 1), expand=False)
