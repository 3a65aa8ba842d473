"""A merge, as a person reads it: what went in, how, what came out, and what was lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from loratools.ops.results import MergeReport
from loratools.report import values
from loratools.report.info_text import rank_histograms
from loratools.report.table_text import short_paths
from loratools.report.tables import Column, pairs, table
from loratools.report.values import Symbols, clean

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
    components = _ranks_by_component(report)
    varied = {name: ranks for name, ranks in components.items() if len(ranks) > 2}
    if len(components) > 1 or dry_run:
        parts.append(_components(report, components, width, symbols))
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
        Column("sha256", [clean(one.get("sha256", ""))[:12] for one in each], priority=4),
    ]
    return table(columns, width=width, symbols=symbols)


def _facts(report: MergeReport, symbols: Symbols, dry_run: bool) -> Iterator[tuple[str, str]]:
    options = [f"{clean(name)} {clean(value)}" for name, value in report.options.items() if value is not None]
    yield "method", ", ".join([clean(report.method), *options])
    yield from _multipliers(report)
    yield "modules", f"{len(report.modules):,}, {_shares(report)}"
    yield "rank", values.counts(report.ranks, symbols, limit=6)
    yield "energy kept", f"{values.percentage(report.energy)} of the method's full-rank result"
    yield "dtype", values.counts(report.dtypes, symbols)
    if report.carried:
        yield "carried", _keys(report.carried)
    if report.dropped:
        yield "dropped", _keys(report.dropped)
    size = f", {values.size(report.bytes)}" if report.bytes else ""
    target = f"{clean(report.output)} ({clean(report.layout)} layout{size})"
    if dry_run:
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


def _ranks_by_component(report: MergeReport) -> dict[str, Counter[int]]:
    found: dict[str, Counter[int]] = {}
    for module in report.modules:
        found.setdefault(module.component, Counter())[module.rank] += 1
    return found


def _components(
    report: MergeReport, components: Mapping[str, Mapping[int, int]], width: int, symbols: Symbols
) -> RenderableType:
    worst = [_least_energy(report, name) for name in components]
    columns = [
        Column("component", [clean(name) for name in components], fold=12),
        Column("modules", [f"{sum(ranks.values()):,}" for ranks in components.values()], right=True),
        Column("rank", [values.ranks(ranks, symbols) for ranks in components.values()], right=True),
        Column("least energy kept", [values.percentage(energy) for energy in worst], right=True, priority=1),
    ]
    return table(columns, width=width, symbols=symbols)


def _least_energy(report: MergeReport, component: str) -> float:
    energies = [module.energy for module in report.modules if module.component == component]
    return min((1.0 if energy is None else energy for energy in energies), default=1.0)
