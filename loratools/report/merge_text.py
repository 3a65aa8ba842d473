"""A merge, as a person reads it: what went in, how, what came out, and what was lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from loratools.report import checkpoint_parts, values
from loratools.report.info_text import rank_histograms
from loratools.report.table_text import short_paths
from loratools.report.tables import Column, pairs, table
from loratools.report.values import Symbols, clean

if TYPE_CHECKING:
    from loratools.ops.merge_results import MergedModule, MergeReport

_KEYS_SHOWN = 5
_HITS_SHOWN = 12


def merge_text(report: MergeReport, *, width: int, symbols: Symbols, dry_run: bool = False) -> RenderableType:
    """What a merge did, or would do.

    Args:
        report: From the operation.
        width: Of the output, in cells.
        symbols: What the output can show.
        dry_run: Whether nothing was written.
    """
    parts: list[RenderableType] = [
        _inputs(report, width, symbols),
        pairs(_facts(report, symbols, dry_run), width=width),
    ]
    ranks = {name: _ranks(own.modules) for name, own in report.components().items()}
    varied = {name: counts for name, counts in ranks.items() if len(counts) > 2}
    if len(ranks) > 1 or dry_run:
        parts.append(_components(report, width, symbols))
    if varied:
        parts.append(rank_histograms(varied, width, symbols))
    notes = [Text(f"Note: {clean(note)}", style="yellow") for note in report.notes]
    parts += [Padding(note, (0, 0, 0, 1), expand=False) for note in notes]
    return Group(*parts)


def _inputs(report: MergeReport, width: int, symbols: Symbols) -> RenderableType:
    each = report.inputs
    columns = [
        Column("input", short_paths([str(one.get("path", "")) for one in each]), fold=24),
        Column("weight", [values.number(one.get("weight")) for one in each], right=True),
        Column("modules", [f"{one.get('modules', 0):,}" for one in each], right=True, priority=1),
        Column("layout", [clean(one.get("layout", "")) for one in each], priority=2),
        Column("architecture", [clean(one.get("arch", "")) for one in each], priority=3),
        Column("size", [_size(one.get("bytes", 0)) for one in each], right=True, priority=3),
        Column("sha256", [clean(one.get("sha256", ""))[:12] for one in each], priority=4),
    ]
    return table(columns, width=width, symbols=symbols)


def _facts(report: MergeReport, symbols: Symbols, dry_run: bool) -> Iterator[tuple[str, str]]:
    options = [f"{clean(name)} {clean(value)}" for name, value in report.options.items() if value is not None]
    yield "method", ", ".join([clean(report.method), *options])
    yield from _multipliers(report)
    yield "modules", f"{len(report.modules):,}, {_shares(report)}"
    before = values.ranks(_before(report.modules), symbols)
    yield "rank", f"{before or 'none'} before, {values.counts(report.ranks, symbols, limit=6)} now"
    yield "energy kept", f"{values.percentage(report.energy)} of the method's full-rank result"
    yield "error", f"{checkpoint_parts.error(report.error)} of that, before rounding"
    yield "dtype", values.counts(report.dtypes, symbols)
    if report.carried:
        yield "carried", _keys(report.carried)
    if report.dropped:
        yield "dropped", _keys(report.dropped)
    size = f", {values.size(report.bytes)}" if report.bytes else ""
    target = f"{clean(report.output)} ({clean(report.layout)} layout{size})"
    if dry_run:
        yield from checkpoint_parts.prediction(report.estimate)
        yield "would write", target
        yield "dry run", "nothing was written"
    else:
        yield "wrote", target


def _multipliers(report: MergeReport) -> Iterator[tuple[str, str]]:
    """What each weight by component, block or pattern hit, over all inputs."""
    hits: dict[str, Counter[str]] = {}
    for one in report.inputs:
        for hit in one.get("multipliers", ()):
            name = f"{clean(hit['name'])}={clean(hit['weight'])}"
            hits.setdefault(clean(hit["by"]), Counter())[name] += hit["modules"]
    for by, counts in hits.items():
        shown = [f"{name} ({values.plural(count, 'module')})" for name, count in counts.items()]
        more = f" and {len(shown) - _HITS_SHOWN:,} more" if len(shown) > _HITS_SHOWN else ""
        yield f"{by} weights", ", ".join(shown[:_HITS_SHOWN]) + more


def _shares(report: MergeReport) -> str:
    """How many modules the inputs share: ``190 of them in all inputs``."""
    everywhere = sum(len(module.inputs) == len(report.inputs) for module in report.modules)
    return (
        "each in all inputs" if everywhere == len(report.modules) else f"{everywhere:,} of them in all inputs"
    )


def _keys(keys: Sequence[str]) -> str:
    first = ", ".join(clean(key) for key in keys[:_KEYS_SHOWN])
    more = f" and {len(keys) - _KEYS_SHOWN:,} more" if len(keys) > _KEYS_SHOWN else ""
    return f"{values.plural(len(keys), 'tensor')} of no module: {first}{more}"


def _size(count: int) -> str:
    return values.size(count) if count else ""


def _ranks(modules: Iterable[MergedModule]) -> Counter[int]:
    return Counter(module.rank for module in modules)


def _before(modules: Iterable[MergedModule]) -> Counter[int]:
    """How many modules of the inputs have each rank."""
    return Counter(rank for module in modules for rank in module.before)


def _components(report: MergeReport, width: int, symbols: Symbols) -> RenderableType:
    groups = report.components()
    every = list(groups.values())
    columns = [
        Column("component", [clean(name) for name in groups], fold=12),
        Column("modules", [f"{len(own.modules):,}" for own in every], right=True),
        Column("before", [values.ranks(_before(own.modules), symbols) for own in every], right=True),
        Column("rank", [values.ranks(_ranks(own.modules), symbols) for own in every], right=True),
        Column("energy kept", [values.percentage(own.energy) for own in every], right=True, priority=1),
        Column("error", [checkpoint_parts.error(own.error) for own in every], right=True, priority=1),
        Column("least energy kept", [_least(own.modules) for own in every], right=True, priority=2),
    ]
    return table(columns, width=width, symbols=symbols)


def _least(modules: Iterable[MergedModule]) -> str:
    return values.percentage(min(module.kept for module in modules))
