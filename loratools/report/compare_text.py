"""A comparison, as a person reads it: the adapters, how each pair relates, and what follows for merging them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from loratools.report import checkpoint_parts as parts
from loratools.report import values
from loratools.report.table_text import short_paths
from loratools.report.tables import Column, pairs, table, wrapped
from loratools.report.values import Symbols, clean

if TYPE_CHECKING:
    from loratools.ops.compare_results import ComparedPair, CompareReport, Matrix, ModulePair, Relation

# Beyond this many adapters a matrix is no longer read but searched: the extremes are shown instead.
_MATRIX = 12
_EXTREMES = 10
_KEYS_SHOWN = 5


def compare_text(report: CompareReport, *, width: int, symbols: Symbols) -> RenderableType:
    """How adapters relate.

    Args:
        report: From the operation.
        width: Of the output, in cells.
        symbols: What the output can show.
    """
    found: list[RenderableType] = [
        _adapters(report, width, symbols),
        pairs(_facts(report, symbols), width=width),
    ]
    if len(report.adapters) == 2:
        found += [_components(pair, width, symbols) for pair in report.pairs]
    elif len(report.adapters) <= _MATRIX:
        found.append(_matrix(report.cosines, width, symbols))
        found.append(_pairs(report, width, symbols))
    else:
        found += _extremes(report, width, symbols)
    for pair in report.pairs:
        if pair.modules:
            found.append(_modules(pair, width, symbols))
    found += parts.notes(report.notes, width)
    if report.suggestion is not None:
        found.append(_suggestion(report, width))
    return Group(*found)


def _adapters(report: CompareReport, width: int, symbols: Symbols) -> RenderableType:
    each = report.adapters
    missing = [f"{len(one.missing):,}" if one.missing else "" for one in each]
    columns = [
        Column("", [str(number) for number in range(1, len(each) + 1)], right=True),
        Column("adapter", short_paths([one.path for one in each]), fold=24),
        Column("weight", [values.number(one.weight) for one in each], right=True, priority=3),
        Column("targets", [f"{one.targets:,}" for one in each], right=True, priority=1),
        Column("lacks", missing, right=True, priority=2),
        Column("rank", [values.ranks(one.ranks, symbols) for one in each], right=True, priority=4),
        Column("norm", [values.number(one.norm) for one in each], right=True),
        Column("layout", [clean(one.layout) for one in each], priority=5),
    ]
    return table(columns, width=width, symbols=symbols)


def _facts(report: CompareReport, symbols: Symbols) -> Iterator[tuple[str, str]]:
    yield "architecture", clean(report.arch)
    yield "compared", values.plural(report.targets, "base weight")
    if len(report.adapters) <= _MATRIX:
        for number, adapter in enumerate(report.adapters, start=1):
            if adapter.missing:
                head = ", ".join(clean(name) for name in adapter.missing[:_KEYS_SHOWN])
                left = len(adapter.missing) - _KEYS_SHOWN
                more = f" and {left:,} more" if left > 0 else ""
                yield f"{number} lacks", f"{head}{more}; counted as 0"
    if len(report.adapters) == 2:
        for pair in report.pairs:
            yield "verdict", _verdict(pair)
            if pair.verdict == "different":
                yield "overall", _sentence(pair.relation, symbols)
    if report.sampled_rows:
        yield "conflict", f"seen in at most {report.sampled_rows} rows of each weight; --exact takes all"
    for group in report.same if len(report.adapters) > 2 else ():
        yield "the same", ", ".join(str(index + 1) for index in group)


def _verdict(pair: ComparedPair) -> str:
    """The verdict in words, with what it rests on."""
    relation = pair.relation
    said = f"distance {parts.error(relation.distance)}, rounding {parts.error(pair.tolerance)} at most"
    if pair.verdict == "same":
        return f"the same adapter ({said})"
    if pair.verdict == "scaled":
        return f"the same but for its strength: 2 is {values.number(pair.multiple)} times 1"
    if pair.verdict == "zero":
        return "one of them changes nothing"
    return f"different adapters ({said})"


def _sentence(relation: Relation, symbols: Symbols) -> str:
    each = [
        ("cosine", _signed(relation.cosine)),
        ("norm ratio", values.number(relation.ratio)),
        ("overlap of outputs", _against(relation.column_overlap, relation.column_chance)),
        ("of inputs", _against(relation.row_overlap, relation.row_chance)),
        ("sign conflict", parts.share(relation.sign_conflict)),
    ]
    return f" {symbols.dot} ".join(f"{name} {value}" for name, value in each if value)


def _against(overlap: float | None, chance: float | None) -> str:
    if overlap is None:
        return ""
    return f"{parts.share(overlap)} (by chance {parts.share(chance)})"


def _components(pair: ComparedPair, width: int, symbols: Symbols) -> RenderableType:
    relations = list(pair.components.values())
    names = [clean(name) for name in pair.components]
    if len(relations) > 1:
        names, relations = [*names, "overall"], [*relations, pair.relation]
    columns = [Column("component", names, fold=12), *_columns(relations)]
    return table(columns, width=width, symbols=symbols)


def _columns(relations: Sequence[Relation]) -> list[Column]:
    return [
        Column("cosine", [_signed(each.cosine) for each in relations], right=True),
        Column("norm ratio", [values.number(each.ratio) for each in relations], right=True, priority=2),
        Column("distance", [parts.error(each.distance) for each in relations], right=True, priority=1),
        Column("outputs", [parts.share(each.column_overlap) for each in relations], right=True, priority=4),
        Column("inputs", [parts.share(each.row_overlap) for each in relations], right=True, priority=5),
        Column("conflict", [parts.share(each.sign_conflict) for each in relations], right=True, priority=3),
    ]


def _matrix(matrix: Matrix, width: int, symbols: Symbols) -> RenderableType:
    """Cosines of all pairs, a dash where there is none; the last columns go first for want of room, and are named."""
    numbers = [str(index + 1) for index in range(len(matrix))]
    columns = [Column("", numbers, right=True)]
    for index, number in enumerate(numbers):
        cells = [_signed(row[index]) or symbols.dash for row in matrix]
        columns.append(Column(number, cells, right=True, priority=index + 1))
    return table(columns, width=width, symbols=symbols, title="cosines")


def _pairs(report: CompareReport, width: int, symbols: Symbols) -> RenderableType:
    columns = [
        Column("pair", [f"{each.first + 1} {each.second + 1}" for each in report.pairs]),
        Column("verdict", [clean(each.verdict) for each in report.pairs], priority=6),
        *_columns([each.relation for each in report.pairs]),
    ]
    return table(columns, width=width, symbols=symbols)


def _extremes(report: CompareReport, width: int, symbols: Symbols) -> list[RenderableType]:
    """The pairs that are most alike, and those most opposed."""
    count = len(report.adapters)
    found = [
        (cosine, first, second)
        for first in range(count)
        for second in range(first + 1, count)
        if (cosine := report.cosines[first][second]) is not None
    ]
    ranked = sorted(found, key=lambda each: (-each[0], *each[1:]))
    least = [each for each in reversed(ranked) if each[0] < 0.0][:_EXTREMES]
    shown = [("most alike", ranked[:_EXTREMES]), ("most opposed", least)]
    return [_extreme(title, each, report, width, symbols) for title, each in shown if each]


def _extreme(
    title: str, found: Sequence[tuple[float, int, int]], report: CompareReport, width: int, symbols: Symbols
) -> RenderableType:
    names = short_paths([adapter.path for adapter in report.adapters])
    columns = [
        Column("cosine", [_signed(cosine) for cosine, _, _ in found], right=True),
        Column(
            "distance", [parts.error(report.distances[i][j]) for _, i, j in found], right=True, priority=1
        ),
        Column("", [f"{i + 1} {j + 1}" for _, i, j in found]),
        Column("adapters", [f"{names[i]} {symbols.dot} {names[j]}" for _, i, j in found], fold=24),
    ]
    return table(columns, width=width, symbols=symbols, title=f"{title} of {_all_pairs(report):,} pairs")


def _all_pairs(report: CompareReport) -> int:
    return math.comb(len(report.adapters), 2)


def _modules(pair: ComparedPair, width: int, symbols: Symbols) -> RenderableType:
    found: Sequence[ModulePair] = pair.modules
    columns = [
        Column("module", [clean(each.target) for each in found], fold=24),
        *_columns([each.relation for each in found]),
        Column("ranks", [f"{each.ranks[0]} {each.ranks[1]}" for each in found], right=True, priority=6),
        Column("out angle", [_degrees(each.column_angle) for each in found], right=True, priority=7),
        Column("in angle", [_degrees(each.row_angle) for each in found], right=True, priority=8),
    ]
    return table(columns, width=width, symbols=symbols, title=f"{pair.first + 1} and {pair.second + 1}")


def _degrees(angle: float | None) -> str:
    return "" if angle is None else f"{angle:.1f} deg"


def _signed(cosine: float | None) -> str:
    """Three decimals, and none that a rounding has made: only equal directions say 1."""
    if cosine is None:
        return ""
    text = f"{cosine:.3f}"
    if abs(cosine) < 1.0 - 1e-9 and text in ("1.000", "-1.000"):
        return "0.999" if cosine > 0 else "-0.999"
    return "0.000" if text == "-0.000" else text


def _suggestion(report: CompareReport, width: int) -> RenderableType:
    found = report.suggestion
    assert found is not None
    weights = ",".join(f"{weight:.3g}" for weight in found.weights)
    plain = all(weight == 1.0 for weight in found.weights)
    asked = f"--method {clean(found.method)}" + ("" if plain else f" --weights {weights}")
    lines = [Text.assemble(("Suggested: ", "bold"), (asked, "green"))]
    lines += [Text(wrapped(reason, width - 1)) for reason in found.reasons]
    rest = [f"{name} {values.number(value)}" for name, value in found.figures.items() if value is not None]
    lines.append(Text(wrapped("It rests on: " + ", ".join(rest) + ".", width - 1), style="dim"))
    return Padding(Group(*lines), (0, 0, 0, 1), expand=False)
