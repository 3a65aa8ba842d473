"""A bake, as a person reads it: what went in, what changed, and how much of it the store dtype has kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from loratools.report import checkpoint_parts as parts
from loratools.report import values
from loratools.report.tables import Column, pairs, table
from loratools.report.values import Symbols, clean

if TYPE_CHECKING:
    from loratools.ops.checkpoint_results import BakedTensor, BakeEstimate, BakeReport

_TENSORS_SHOWN = 5

_ROUNDINGS = {
    "nearest": "to nearest",
    "stochastic": "stochastic",
    "compensated": "to nearest, compensated",
}


def bake_text(report: BakeReport, *, width: int, symbols: Symbols, dry_run: bool = False) -> RenderableType:
    """What a bake did, or would do.

    Args:
        report: From the operation.
        width: Of the output, in cells.
        symbols: What the output can show.
        dry_run: Whether nothing was written.
    """
    unmatched = [len(keys) for keys in report.missing]
    found: list[RenderableType] = [
        parts.adapters(
            report.adapters,
            report.weights,
            width=width,
            symbols=symbols,
            counts={"modules": report.matched, "missing": unmatched, "left out": report.left_out},
        ),
        pairs(_facts(report, symbols, dry_run), width=width),
    ]
    if dry_run:
        found.append(_components(report, width, symbols))
    worst = _worst(report)
    if worst:
        found.append(_tensors(worst, len(report.tensors), width, symbols))
    return Group(*found, *parts.notes((*report.notes, *_noted(report)), width))


def _facts(report: BakeReport, symbols: Symbols, dry_run: bool) -> Iterator[tuple[str, str]]:
    yield "base", clean(report.base)
    yield "architecture", clean(report.arch)
    size = values.size(report.changed_bytes)
    yield "to change" if dry_run else "changed", f"{values.plural(len(report.tensors), 'tensor')}, {size}"
    others = f", {values.plural(len(report.beside), 'other file')}" if report.beside else ""
    yield "to copy" if dry_run else "copied", f"{values.plural(report.copied, 'tensor')}{others}"
    yield "dtype", values.counts(Counter(tensor.dtype for tensor in report.tensors), symbols)
    computed = "float64" if report.precise else "float32"
    yield (
        "rounding",
        f"{_ROUNDINGS.get(report.rounding, clean(report.rounding))}, computed in {computed}",
    )
    if report.kept is not None:
        yield "kept", f"{parts.share(report.kept)} of the change; rounding error {parts.error(report.error)}"
    for line in parts.missing(report.adapters, report.missing):
        yield "skipped", line
    if report.resumed:
        taken = values.plural(report.resumed, "task")
        yield "resumed", f"{taken} of the interrupted run taken over, {values.size(report.resumed_bytes)}"
    yield from _end(report, dry_run)


def _end(report: BakeReport, dry_run: bool) -> Iterator[tuple[str, str]]:
    files = f", {report.files:,} files" if report.files > 1 else ""
    target = f"{clean(report.output)} ({values.size(report.bytes)}{files})"
    if not dry_run:
        yield "time", parts.duration(report.seconds)
        yield "wrote", target
        return
    if report.estimate is not None:
        yield "speed", _speed(report.estimate)
        yield from parts.prediction(report.estimate.whole)
    yield "would write", target
    yield "dry run", "nothing was written"


def _speed(estimate: BakeEstimate) -> str:
    """What was measured; nothing is of files at URLs, nor where nothing is computed."""
    rates = {"copies": estimate.copy_rate, "computes": estimate.compute_rate}
    told = [f"{what} at {values.size(round(rate))}/s" for what, rate in rates.items() if math.isfinite(rate)]
    return ", ".join(told) or "not measured"


def _components(report: BakeReport, width: int, symbols: Symbols) -> RenderableType:
    components = list(dict.fromkeys(tensor.component for tensor in report.tensors))
    own = [[tensor for tensor in report.tensors if tensor.component == name] for name in components]
    columns = [
        Column("component", [clean(name) for name in components], fold=12),
        Column("tensors", [f"{len(each):,}" for each in own], right=True),
        Column(
            "dtype", [values.counts(Counter(one.dtype for one in each), symbols) for each in own], priority=1
        ),
    ]
    return table(columns, width=width, symbols=symbols)


def _worst(report: BakeReport) -> list[BakedTensor]:
    """The tensors that rounding took most from, worst first; none where it took nothing."""
    rounded = [tensor for tensor in report.tensors if tensor.error]
    return sorted(rounded, key=lambda tensor: -(tensor.error or 0.0))[:_TENSORS_SHOWN]


def _tensors(worst: list[BakedTensor], count: int, width: int, symbols: Symbols) -> RenderableType:
    columns = [
        Column("tensor", [clean(tensor.target or tensor.key) for tensor in worst], fold=24),
        Column("dtype", [clean(tensor.dtype) for tensor in worst], priority=2),
        Column("norm", [values.number(tensor.norm) for tensor in worst], right=True, priority=1),
        Column("kept", [parts.share(tensor.kept) for tensor in worst], right=True),
        Column("error", [parts.error(tensor.error) for tensor in worst], right=True),
    ]
    left = count - len(worst)
    title = f"largest rounding errors of {count:,} tensors" if left > 0 else ""
    return table(columns, width=width, symbols=symbols, title=title)


def _noted(report: BakeReport) -> Iterator[str]:
    """What is said of single tensors, once for all of which the same is said but for numbers."""
    groups: dict[str, list[str]] = {}
    for tensor in report.tensors:
        if tensor.note:
            kind = "".join(char for char in tensor.note if not char.isdigit() and char != ".")
            groups.setdefault(kind, []).append(f"{tensor.key}: {tensor.note}")
    for notes in groups.values():
        more = f" (and {len(notes) - 1:,} more like it)" if len(notes) > 1 else ""
        yield f"{notes[0]}{more}"
