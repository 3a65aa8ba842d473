"""A verification, as a person reads it: whether the bake happened, by component, and where it did not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from loratools.report import checkpoint_parts as parts
from loratools.report import values
from loratools.report.tables import Column, pairs, table
from loratools.report.values import Symbols, clean

if TYPE_CHECKING:
    from loratools.ops.checkpoint_results import VerifiedTensor, VerifyReport

_TENSORS_SHOWN = 10
_FEW_SHOWN = 5
# What each verdict is, for somebody who has not read the documentation; the worst first.
_VERDICTS = {
    "absent": "not in the result",
    "wrong": "changed to something else",
    "unexpected": "new or changed, and no adapter does it",
    "not baked": "still the base's",
    "partly": "baked in part",
    "baked": "as it should be",
}
_GOOD = "baked"


def verify_text(report: VerifyReport, *, width: int, symbols: Symbols) -> RenderableType:
    """Whether a bake happened, and what of it survived.

    Args:
        report: From the operation.
        width: Of the output, in cells.
        symbols: What the output can show.
    """
    found: list[RenderableType] = [
        parts.adapters(report.adapters, report.weights, width=width, symbols=symbols),
        pairs(_facts(report), width=width),
    ]
    if report.tensors:
        found.append(_components(report, width, symbols))
        found.append(_worst(report, width, symbols))
    found += parts.notes(report.notes, width)
    found.append(_conclusion(report))
    return Group(*found)


def _facts(report: VerifyReport) -> Iterator[tuple[str, str]]:
    yield "base", clean(report.base)
    yield "result", clean(report.baked)
    yield "architecture", clean(report.arch)
    counts = Counter(tensor.verdict for tensor in report.tensors)
    for verdict, words in _VERDICTS.items():
        if counts[verdict]:
            yield verdict, f"{values.plural(counts[verdict], 'tensor')}, {words}"
    yield "untouched", f"{values.plural(report.untouched, 'tensor')}, as in the base"
    if report.kept is not None:
        yield "kept", f"{parts.share(report.kept)} of the change; error {parts.error(report.error)}"
    for line in parts.missing(report.adapters, report.missing):
        yield "skipped", line


def _components(report: VerifyReport, width: int, symbols: Symbols) -> RenderableType:
    groups: dict[str, list[VerifiedTensor]] = {}
    for tensor in report.tensors:
        groups.setdefault(tensor.component, []).append(tensor)
    good = [sum(tensor.verdict == _GOOD for tensor in own) for own in groups.values()]
    bad = [len(own) - count for own, count in zip(groups.values(), good, strict=True)]
    columns = [
        Column("component", [clean(name) or "other" for name in groups], fold=12),
        Column("baked", [f"{count:,}" for count in good], right=True),
        Column(
            "not so",
            [f"{count:,}" if count else "" for count in bad],
            right=True,
            style=["red" if count else "" for count in bad],
        ),
        Column("kept", [parts.share(_kept(own)) for own in groups.values()], right=True),
        Column("error", [parts.error(_error(own)) for own in groups.values()], right=True),
        Column(
            "of rounding", [parts.error(_rounding(own)) for own in groups.values()], right=True, priority=1
        ),
    ]
    return table(columns, width=width, symbols=symbols)


def _kept(tensors: Sequence[VerifiedTensor]) -> float | None:
    """Of all of them together: ⟨Q − W, ΔW⟩ / ‖ΔW‖² over their values side by side."""
    known = [(tensor.kept, tensor.norm) for tensor in tensors if tensor.kept is not None]
    energy = sum(norm**2 for _, norm in known)
    return sum(kept * norm**2 for kept, norm in known) / energy if energy else None


def _error(tensors: Sequence[VerifiedTensor]) -> float | None:
    return _together([(tensor.error, tensor.norm) for tensor in tensors])


def _rounding(tensors: Sequence[VerifiedTensor]) -> float | None:
    return _together([(tensor.rounding, tensor.norm) for tensor in tensors])


def _together(errors: Sequence[tuple[float | None, float]]) -> float | None:
    """Relative errors of several changes as one of all."""
    known = [(error, norm) for error, norm in errors if error is not None]
    energy = math.hypot(*(norm for _, norm in known))
    return math.hypot(*(error * norm for error, norm in known)) / energy if energy else None


def _worst(report: VerifyReport, width: int, symbols: Symbols) -> RenderableType:
    order = list(_VERDICTS)
    ranked = sorted(report.tensors, key=lambda tensor: (order.index(tensor.verdict), -(tensor.error or 0.0)))
    failed = sum(tensor.verdict != _GOOD for tensor in ranked)
    worst = ranked[: max(_FEW_SHOWN, min(failed, _TENSORS_SHOWN))]
    columns = [
        Column("tensor", [clean(tensor.target or tensor.key) for tensor in worst], fold=24),
        Column(
            "verdict",
            [clean(tensor.verdict) for tensor in worst],
            style=["" if tensor.verdict == _GOOD else "red" for tensor in worst],
        ),
        Column("kept", [parts.share(tensor.kept) for tensor in worst], right=True),
        Column("error", [parts.error(tensor.error) for tensor in worst], right=True),
        Column("of rounding", [parts.error(tensor.rounding) for tensor in worst], right=True, priority=1),
        Column("dtype", [clean(tensor.dtype) for tensor in worst], priority=2),
    ]
    title = f"worst of {len(ranked):,} tensors" if len(ranked) > len(worst) else ""
    return table(columns, width=width, symbols=symbols, title=title)


def _conclusion(report: VerifyReport) -> Text:
    if report.ok:
        return Text(" Baked: every tensor is what it should be.", style="green")
    failed = sum(tensor.verdict != _GOOD for tensor in report.tensors)
    return Text(f" Not baked as it should be: {values.plural(failed, 'tensor')} differ.", style="red")
