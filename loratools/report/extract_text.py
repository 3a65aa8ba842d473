"""An extraction, as a person reads it: what differs, what of it the adapter holds, and what was left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from loratools.report import checkpoint_parts as parts
from loratools.report import values
from loratools.report.info_text import rank_histograms
from loratools.report.tables import Column, pairs, table
from loratools.report.values import Symbols, clean

if TYPE_CHECKING:
    from loratools.ops.checkpoint_results import ExtractedModule, ExtractReport

_MODULES_SHOWN = 5


def extract_text(
    report: ExtractReport, *, width: int, symbols: Symbols, dry_run: bool = False
) -> RenderableType:
    """What an extraction found and wrote, or would write.

    Args:
        report: From the operation.
        width: Of the output, in cells.
        symbols: What the output can show.
        dry_run: Whether nothing was written.
    """
    found: list[RenderableType] = [pairs(_facts(report, symbols, dry_run), width=width)]
    if report.modules:
        found.append(_components(report, dry_run, width, symbols))
    if len(report.ranks) > 2:
        found.append(rank_histograms(_ranks_by_component(report), width, symbols))
    lossy = [module for module in report.modules if module.error > 0.0]
    if lossy and not dry_run:
        found.append(_worst(lossy, len(report.modules), width, symbols))
    if report.left_out:
        found.append(_left_out(report, width, symbols))
    return Group(*found, *parts.notes(report.notes, width))


def _facts(report: ExtractReport, symbols: Symbols, dry_run: bool) -> Iterator[tuple[str, str]]:
    yield "base", clean(report.base)
    yield "tuned", clean(report.tuned)
    yield "architecture", clean(report.arch)
    yield "rule", clean(report.rule)
    same = f"; {report.unchanged:,} more did not change" if report.unchanged else ""
    kinds = Counter(module.kind for module in report.modules)
    what = f" ({values.counts(kinds, symbols)})" if kinds else ""
    yield "modules", f"{len(report.modules):,}{what}{same}"
    yield "rank", values.counts(report.ranks, symbols, 6) if report.ranks else ""
    if not dry_run:
        yield "energy kept", f"{values.percentage(report.energy)} of the extracted weights' differences"
        best = f"; the best possible at these ranks is {parts.error(report.optimum)}"
        yield "error", parts.error(report.error) + (best if report.error else "")
    yield "computed on", clean(report.device)
    what = f"{clean(report.layout)} layout, {clean(report.dtype)}, {values.size(report.bytes)}"
    target = f"{clean(report.output)} ({what})"
    if dry_run:
        yield from parts.prediction(report.estimate)
        yield "would write", target
        yield "dry run", "nothing was written"
    else:
        yield "time", parts.duration(report.seconds)
        yield "wrote", target


def _ranks_by_component(report: ExtractReport) -> dict[str, Counter[int]]:
    found: dict[str, Counter[int]] = {}
    for module in report.modules:
        if module.rank is not None:
            found.setdefault(module.component, Counter())[module.rank] += 1
    return found


def _components(report: ExtractReport, dry_run: bool, width: int, symbols: Symbols) -> RenderableType:
    groups: dict[str, list[ExtractedModule]] = {}
    for module in report.modules:
        groups.setdefault(module.component, []).append(module)
    ranks = _ranks_by_component(report)
    columns = [
        Column("component", [clean(name) for name in groups], fold=12),
        Column("modules", [f"{len(own):,}" for own in groups.values()], right=True),
        Column("rank", [values.ranks(ranks.get(name, {}), symbols) for name in groups], right=True),
    ]
    if not dry_run:
        errors = [_overall_error(own) for own in groups.values()]
        columns += [
            Column("norm", [values.number(_norm(own)) for own in groups.values()], right=True, priority=1),
            Column("energy kept", [values.percentage(1.0 - each**2) for each in errors], right=True),
            Column("error", [parts.error(each) for each in errors], right=True),
        ]
    return table(columns, width=width, symbols=symbols)


def _norm(modules: Sequence[ExtractedModule]) -> float:
    return math.hypot(*(module.norm for module in modules))


def _overall_error(modules: Sequence[ExtractedModule]) -> float:
    """Relative to all the modules' differences together."""
    norm = _norm(modules)
    return math.hypot(*(module.error * module.norm for module in modules)) / norm if norm else 0.0


def _worst(modules: list[ExtractedModule], count: int, width: int, symbols: Symbols) -> RenderableType:
    worst = sorted(modules, key=lambda module: -module.error)[:_MODULES_SHOWN]
    columns = [
        Column("module", [clean(module.target) for module in worst], fold=24),
        Column("rank", ["" if module.rank is None else f"{module.rank:,}" for module in worst], right=True),
        Column("norm", [values.number(module.norm) for module in worst], right=True, priority=2),
        Column("energy kept", [values.percentage(module.energy) for module in worst], right=True, priority=1),
        Column("error", [parts.error(module.error) for module in worst], right=True),
        Column("best", [parts.error(module.optimum) for module in worst], right=True, priority=1),
    ]
    title = f"largest errors of {count:,} modules" if count > len(worst) else ""
    return table(columns, width=width, symbols=symbols, title=title)


def _left_out(report: ExtractReport, width: int, symbols: Symbols) -> RenderableType:
    """What differs and was not taken, by reason: the largest differences first."""
    groups: dict[str, list[float]] = {}
    first: dict[str, str] = {}
    for each in report.left_out:
        groups.setdefault(each.why, []).append(each.norm)
        first.setdefault(each.why, each.key)
    reasons = sorted(groups, key=lambda why: -math.hypot(*groups[why]))
    columns = [
        Column("left out, because", [clean(why) for why in reasons], fold=24),
        Column("tensors", [f"{len(groups[why]):,}" for why in reasons], right=True),
        Column("norm", [values.number(math.hypot(*groups[why])) for why in reasons], right=True),
        Column("first", [clean(first[why]) for why in reasons], priority=1),
    ]
    return table(columns, width=width, symbols=symbols)
