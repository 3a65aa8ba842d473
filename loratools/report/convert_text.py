"""A conversion, as a person reads it: what went in, what came out, and what became of every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from loratools.ops.results import Conversion, ConvertReport
from loratools.report import values
from loratools.report.tables import Column, pairs, table
from loratools.report.values import Symbols, clean

_KEYS_SHOWN = 5
_CONVERSIONS_SHOWN = 10

# What the fates mean, for somebody who has not read the documentation.
_FATES = {
    "moved": "renamed",
    "split": "split from a fused weight",
    "fused": "fused with others",
    "folded": "folded into factors",
    "converted": "turned into LoRA",
    "metadata": "kept in the metadata",
    "dropped": "dropped",
}


def convert_text(
    report: ConvertReport, *, width: int, symbols: Symbols, dry_run: bool = False
) -> RenderableType:
    """What a conversion did, or would do.

    Args:
        report: From the operation.
        width: Of the output, in cells.
        symbols: What the output can show.
        dry_run: Whether nothing was written.
    """
    parts: list[RenderableType] = [pairs(_facts(report, symbols, dry_run), width=width)]
    inexact = [each for each in report.conversions if not each.exact]
    if inexact:
        parts.append(_conversions(inexact, width, symbols))
    notes = [Text(f"Note: {clean(note)}", style="yellow") for note in report.notes]
    parts += [Padding(note, (0, 0, 0, 1), expand=False) for note in notes]
    return Group(*parts)


def _facts(report: ConvertReport, symbols: Symbols, dry_run: bool) -> Iterator[tuple[str, str]]:
    yield "from", f"{clean(report.input)} ({clean(report.source)} layout, {clean(report.arch)})"
    before, after = report.modules
    yield "modules", f"{before:,}" if before == after else f"{before:,}, written as {after:,}"
    yield "kinds", values.counts(report.kinds, symbols)
    yield "rank", values.counts(report.ranks, symbols, limit=6)
    yield "dtype", values.counts(report.dtypes, symbols)
    fates = [f"{count:,} {_FATES.get(fate, fate)}" for fate, count in report.fates.items()]
    yield "tensors", ", ".join(fates)
    if report.conversions:
        yield "to LoRA", _summary(report.conversions)
    if report.dropped:
        yield "dropped", _keys(report.dropped)
    yield "verified", _verified(report)
    target = f"{clean(report.output)} ({clean(report.layout)} layout, {values.size(report.bytes)})"
    if dry_run:
        yield "would write", target
        yield "dry run", "nothing was written"
    else:
        yield "wrote", target


def _verified(report: ConvertReport) -> str:
    if report.weights is None:
        return "no (--no-verify)"
    worst = f" ({clean(report.worst)})" if report.error else ""
    return f"ΔW·x of {values.plural(report.weights, 'weight')}, largest error {report.error or 0:.1e}{worst}"


def _summary(conversions: Sequence[Conversion]) -> str:
    exact = sum(each.exact for each in conversions)
    if exact == len(conversions):
        return f"{values.plural(exact, 'module')}, all exactly"
    worst = max(each.error for each in conversions)
    return f"{values.plural(len(conversions), 'module')}, {exact:,} exactly; largest error {values.percentage(worst)}"


def _conversions(conversions: Sequence[Conversion], width: int, symbols: Symbols) -> RenderableType:
    worst = sorted(conversions, key=lambda each: -each.error)[:_CONVERSIONS_SHOWN]
    columns = [
        Column("module", [clean(each.target) for each in worst], fold=24),
        Column("kind", [clean(each.kind) for each in worst], priority=1),
        Column("rank", [f"{each.rank:,}" for each in worst], right=True),
        Column("error of ΔW", [values.percentage(each.error) for each in worst], right=True),
    ]
    return table(columns, width=width, symbols=symbols)


def _keys(keys: Sequence[str]) -> str:
    first = ", ".join(clean(key) for key in keys[:_KEYS_SHOWN])
    more = f" and {len(keys) - _KEYS_SHOWN:,} more" if len(keys) > _KEYS_SHOWN else ""
    return f"{values.plural(len(keys), 'tensor')}: {first}{more}"
