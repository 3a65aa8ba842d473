"""A resize, as a person reads it: ranks before and after, and what of ΔW was kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from loratools.report import checkpoint_parts as parts
from loratools.report import values
from loratools.report.info_text import rank_histograms
from loratools.report.tables import Column, pairs, table
from loratools.report.values import Symbols, clean

if TYPE_CHECKING:
    from loratools.ops.resize_results import ResizedModule, ResizeReport

_MODULES_SHOWN = 5
_LONGEST_BAR = 40
_LEAST_BAR = 10
_BESIDE_BARS = 20  # cells of a plot's other columns


def resize_text(
    report: ResizeReport, *, width: int, symbols: Symbols, plot: bool = False, dry_run: bool = False
) -> RenderableType:
    """What a resize did, or would do.

    Args:
        report: From the operation.
        width: Of the output, in cells.
        symbols: What the output can show.
        plot: Whether to show the energy kept against the rank.
        dry_run: Whether nothing was written.
    """
    found: list[RenderableType] = [
        pairs(_facts(report, symbols, dry_run), width=width),
        _components(report, width, symbols),
    ]
    ranks = {name: _ranks(module.rank for module in own.modules) for name, own in report.components().items()}
    varied = {name: counts for name, counts in ranks.items() if len(counts) > 2}
    if varied:
        found.append(rank_histograms(varied, width, symbols))
    if plot:
        found += [_plot(name, curve, width, symbols) for name, curve in report.curves.items()]
    lossy = [module for module in report.modules if module.error > 0.0]
    if lossy:
        found.append(_worst(lossy, len(report.modules), width, symbols))
    return Group(*found, *parts.notes(report.notes, width))


def _facts(report: ResizeReport, symbols: Symbols, dry_run: bool) -> Iterator[tuple[str, str]]:
    yield "input", clean(report.input)
    yield "architecture", clean(report.arch)
    yield "rule", clean(report.rule)
    carried = sum(not module.changed for module in report.modules)
    same = f", {carried:,} of them as they were" if carried else ""
    yield "modules", f"{len(report.modules):,}{same}"
    before = _ranks(module.before for module in report.modules)
    after = _ranks(module.rank for module in report.modules)
    yield "rank", f"{values.ranks(before, symbols) or 'none'} before, {values.ranks(after, symbols)} now"
    yield "energy kept", values.percentage(report.energy)
    yield "error", f"{parts.error(report.error)} of what the input changes"
    yield "dtype", values.counts(report.dtypes, symbols)
    if report.dropped:
        yield "left out", f"{values.plural(len(report.dropped), 'module')}: {parts.names(report.dropped)}"
    if report.carried:
        what = values.plural(len(report.carried), "tensor")
        yield "carried", f"{what} of no module: {parts.names(report.carried)}"
    yield "size", _sizes(report)
    target = f"{clean(report.output)} ({clean(report.layout)} layout)"
    if dry_run:
        yield from parts.prediction(report.estimate)
        yield "would write", target
        yield "dry run", "nothing was written"
    else:
        yield "wrote", target


def _sizes(report: ResizeReport) -> str:
    if not report.bytes_before:
        return values.size(report.bytes)
    share = report.bytes / report.bytes_before
    # Ranks may be raised, too: a share of more than the whole is none of those that are rounded down to 100%.
    part = values.percentage(share) if share <= 1.0 else f"{share:.0%}"
    return f"{values.size(report.bytes_before)} before, {values.size(report.bytes)} now ({part})"


def _ranks(found: Iterable[int | None]) -> Counter[int]:
    return Counter(rank for rank in found if rank is not None)


def _components(report: ResizeReport, width: int, symbols: Symbols) -> RenderableType:
    groups = report.components()
    every = list(groups.values())
    columns = [
        Column("component", [clean(name) for name in groups], fold=12),
        Column("modules", [f"{len(own.modules):,}" for own in every], right=True),
        Column(
            "before",
            [values.ranks(_ranks(each.before for each in own.modules), symbols) for own in every],
            right=True,
        ),
        Column(
            "rank",
            [values.ranks(_ranks(each.rank for each in own.modules), symbols) for own in every],
            right=True,
        ),
        Column("energy kept", [values.percentage(own.energy) for own in every], right=True, priority=1),
        Column("error", [parts.error(own.error) for own in every], right=True, priority=1),
    ]
    return table(columns, width=width, symbols=symbols)


def _plot(name: str, curve: Mapping[int, float], width: int, symbols: Symbols) -> RenderableType:
    """One bar per rank: how much of a component's Σσ² is kept if every module is cut to it."""
    longest = max(_LEAST_BAR, min(_LONGEST_BAR, width - _BESIDE_BARS))
    columns = [
        Column("rank", [f"{rank:,}" for rank in curve], right=True),
        Column("energy kept", [values.percentage(share) for share in curve.values()], right=True),
        Column("", [symbols.bars[-1] * round(share * longest) for share in curve.values()]),
    ]
    return table(columns, width=width, symbols=symbols, title=f"energy kept by rank: {clean(name)}")


def _worst(modules: list[ResizedModule], count: int, width: int, symbols: Symbols) -> RenderableType:
    worst = sorted(modules, key=lambda module: -module.error)[:_MODULES_SHOWN]
    columns = [
        Column("module", [clean(module.target) for module in worst], fold=24),
        Column("before", [_count(module.before) for module in worst], right=True, priority=1),
        Column("rank", [_count(module.rank) for module in worst], right=True),
        Column("norm", [values.number(module.norm) for module in worst], right=True, priority=2),
        Column("energy kept", [values.percentage(module.energy) for module in worst], right=True, priority=1),
        Column("error", [parts.error(module.error) for module in worst], right=True),
    ]
    title = f"largest errors of {count:,} modules" if count > len(worst) else ""
    return table(columns, width=width, symbols=symbols, title=title)


def _count(rank: int | None) -> str:
    return "" if rank is None else f"{rank:,}"
