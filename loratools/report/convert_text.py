"""A conversion, as a person reads it: what went in, what came out, and what became of every tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from loratools.ops.results import Conversion, ConvertReport
from loratools.report import values
from loratools.report.tables import Column, pairs, table, wrapped
from loratools.report.values import Symbols, clean

_KEYS_SHOWN = 5
_CONVERSIONS_SHOWN = 10
_SAME = "same"

# What the fates mean, for somebody who has not read the documentation, in the order in which they are told.
_FATES = {
    _SAME: "as they were",
    "moved": "renamed",
    "split": "split from fused weights",
    "fused": "fused with others",
    "converted": "turned into LoRA",
    "folded": "folded into factors",
    "padded": "padded with zeros",
    "metadata": "kept in the metadata",
    "implied": "implied",
    "zero": "zero and left out",
    "apart": "written apart",
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
    notes = [
        Text(wrapped(f"Note: {clean(note)}", width - 1), style="yellow") for note in _notes(report.notes)
    ]
    parts += [Padding(note, (0, 0, 0, 1), expand=False) for note in notes]
    return Group(*parts)


def _facts(report: ConvertReport, symbols: Symbols, dry_run: bool) -> Iterator[tuple[str, str]]:
    before, after = report.modules
    yield "from", clean(report.input)
    source, layout = clean(report.source), clean(report.layout)
    yield "layout", layout if source == layout else f"{source} to {layout}"
    if report.runtime:
        yield "for", clean(report.runtime)
    yield "architecture", clean(report.arch)
    yield "modules", f"{before:,}" if before == after else f"{before:,}, written as {after:,}"
    yield "kinds", values.counts(report.kinds, symbols)
    # Kinds without a rank are counted as 0.
    yield "rank", values.counts({rank: count for rank, count in report.ranks.items() if rank}, symbols, 6)
    yield "dtype", values.counts(report.dtypes, symbols)
    yield "tensors", _fates(report)
    if report.conversions:
        yield "to LoRA", _summary(report.conversions)
    if report.normalised:
        yield "normal form", _normalised(report)
    yield from (("dropped", each) for each in _dropped(report))
    yield "verified", _verified(report)
    if report.error:
        yield "differs most", clean(report.worst)
    target = f"{clean(report.output)} ({values.size(report.bytes)})"
    if dry_run:
        yield "would write", target
        yield "dry run", "nothing was written"
    else:
        yield "wrote", target
        if report.full_weights:
            yield "wrote", f"{clean(report.full_weights)}, whole tensors of the base"


def _normalised(report: ConvertReport) -> str:
    """``12 padded, 3 folded``, and how many of these modules have the very ΔW they had."""
    counts = Counter(change for each in report.normalised for change in each.changes)
    exact = sum(each.exact for each in report.normalised)
    done = ", ".join(f"{count:,} {change}" for change, count in counts.items())
    return f"{done}; {exact:,} of {values.plural(len(report.normalised), 'module')} exactly"


def _fates(report: ConvertReport) -> str:
    """``722 renamed, 722 kept in the metadata``; what kept its key is told apart from what has a new one."""
    counts = Counter(
        _SAME if entry.fate == "moved" and entry.into == (entry.key,) else entry.fate
        for entry in report.ledger
    )
    return ", ".join(f"{counts[fate]:,} {words}" for fate, words in _FATES.items() if counts[fate])


def _dropped(report: ConvertReport) -> Iterator[str]:
    """What was left out, by what --drop calls it."""
    groups: dict[str, list[str]] = {}
    for entry in report.ledger:
        if entry.fate == "dropped":
            groups.setdefault(entry.detail, []).append(clean(entry.key))
    for tag, keys in groups.items():
        more = f" and {len(keys) - _KEYS_SHOWN:,} more" if len(keys) > _KEYS_SHOWN else ""
        shown = ", ".join(keys[:_KEYS_SHOWN])
        yield f"{values.plural(len(keys), 'tensor')} ({clean(tag)}): {shown}{more}"


def _verified(report: ConvertReport) -> str:
    if report.weights is None:
        return "no (--no-verify)"
    what = f"{values.plural(report.weights, 'weight')} on random inputs"
    if not report.error:
        return f"{what}, no difference"
    return f"{what}, largest difference {report.error:.1e}"


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
        Column("error", [values.percentage(each.error) for each in worst], right=True),
    ]
    left = len(conversions) - len(worst)
    title = f"largest errors of {len(conversions):,} modules" if left else ""
    return table(columns, width=width, symbols=symbols, title=title)


def _notes(notes: Sequence[str]) -> Iterator[str]:
    """The notes, one for all weights of which the same is said: a model's blocks are alike."""
    groups: dict[str, list[str]] = {}
    for note in notes:
        first, _, rest = note.partition(" ")
        groups.setdefault(rest if "." in first else note, []).append(note)
    for found in groups.values():
        yield found[0] if len(found) == 1 else f"{found[0]} (and {len(found) - 1:,} more like it)"
