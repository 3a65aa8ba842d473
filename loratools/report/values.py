"""Single values as people read them: sizes, counts, percentages, ranks, and text from untrusted files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loratools.errors import visible

_SIZES = ("B", "kB", "MB", "GB", "TB")
_BINS = 24
# What stands for our own symbols where an output lacks them, in the order in which they are replaced.
_TWINS = (
    ("Σ ", "sum "), ("Σ", "sum "), ("σ", "s"), ("Δ", "d"), ("‖", "||"), ("²", "^2"), ("³", "^3"), ("√", "sqrt"),
    ("·", "*"), ("×", "x"), ("−", "-"), ("–", "-"), ("—", "--"), ("…", "..."), ("⟨", "<"), ("⟩", ">"), ("≤", "<="),
    ("≥", ">="), ("≠", "!="), ("∞", "inf"), ("─", "-"),
)  # fmt: skip

clean = visible
"""What a report shows of a name or a value from a file, whose text nobody vouches for."""


class Symbols(NamedTuple):
    """The characters beyond ASCII that a report uses, or what stands in for them.

    Attributes:
        times: Between a value and its count.
        dot: Between the parts of one line.
        dash: Between the ends of a range.
        more: Where something was left out.
        bars: Eight bars of growing height.
        rule: What a line under headings is made of.
        encoding: That of the output, where it lacks characters of others.
    """

    times: str = "×"
    dot: str = "·"
    dash: str = "–"
    more: str = "…"
    bars: str = "▁▂▃▄▅▆▇█"
    rule: str = "─"
    encoding: str = "utf-8"


UNICODE = Symbols()
ASCII = Symbols(times="x", dot="|", dash="-", more="...", bars=".:-=+*#@", rule="-", encoding="ascii")


def symbols_for(encoding: str | None) -> Symbols:
    """The symbols that an output of this encoding can show."""
    known = encoding or "ascii"
    return UNICODE if _encodable("".join(UNICODE), known) else ASCII._replace(encoding=known)


def fitted(text: str, encoding: str | None) -> str:
    """Text as an output of this encoding can show it: twins in ASCII for our own symbols, escapes for all else."""
    known = encoding or "ascii"
    if _encodable(text, known):
        return text
    for symbol, twin in _TWINS:
        if symbol in text and not _encodable(symbol, known):
            text = text.replace(symbol, twin)
    try:
        return text.encode(known, "backslashreplace").decode(known)
    except LookupError:
        return text.encode("ascii", "backslashreplace").decode("ascii")


def _encodable(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def size(count: int) -> str:
    """Bytes in decimal units: ``170.5 MB``."""
    value = float(count)
    for unit in _SIZES:
        if value < 999.95 or unit == _SIZES[-1]:
            break
        value /= 1000
    return f"{count:,} B" if unit == "B" else f"{value:,.1f} {unit}"


def number(value: float | None) -> str:
    """Four significant digits, three with an exponent; nothing where there is no value."""
    if value is None:
        return ""
    plain = value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e4
    return f"{value:.4g}" if plain else f"{value:.2e}"


def percentage(fraction: float | None) -> str:
    """A fraction as a percentage, rounded down, so that only what is whole says 100%."""
    if fraction is None:
        return ""
    if not math.isfinite(fraction):
        return str(fraction)
    if fraction >= 1.0:
        return "100%"
    digits = 1 if fraction < 0.99 else 2
    # The tiny addition undoes the binary representation's shortfall: 0.29 * 1000 is 289.99…
    floored = math.floor(fraction * 100 * 10**digits + 1e-9) / 10**digits
    return f"{min(floored, 99.99):.{digits}f}%"


def plural(count: int, word: str) -> str:
    """``1 module``, ``1,234 modules``."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def counts(values: Mapping[str, int] | Mapping[int, int], symbols: Symbols, limit: int = 4) -> str:
    """``F16 ×722, F32 ×3``: the commonest first, the others counted; a single value stands alone."""
    if len(values) == 1:
        return clean(next(iter(values)))
    common = sorted(values.items(), key=lambda item: -item[1])
    shown = [f"{clean(value)} {symbols.times}{count:,}" for value, count in common[:limit]]
    left = len(common) - limit
    return ", ".join(shown) + (f", {left} more" if left > 0 else "")


def ranks(found: Mapping[int, int], symbols: Symbols) -> str:
    """``32``, ``16 ×192, 8 ×4``, or ``1–64`` where there are many."""
    if not found:
        return ""
    if len(found) > 2:
        return f"{min(found)}{symbols.dash}{max(found)}"
    return counts(found, symbols)


def histogram(found: Mapping[int, int], symbols: Symbols) -> str:
    """One bar per rank, or where they are many one per equal step of ranks, with gaps where there are none."""
    if not found:
        return ""
    bars = _heights(_binned(sorted(found.items())), symbols.bars)
    return f"{min(found)} {bars} {max(found)}"


def _binned(items: Sequence[tuple[int, int]]) -> list[int]:
    if len(items) <= _BINS:
        return [count for _, count in items]
    low, high = items[0][0], items[-1][0]
    bins = [0] * _BINS
    for rank, count in items:
        bins[min(_BINS - 1, (rank - low) * _BINS // (high - low + 1))] += count
    return bins


def _heights(bins: Sequence[int], bars: str) -> str:
    top = max(bins)
    return "".join(bars[max(0, math.ceil(count * len(bars) / top) - 1)] if count else " " for count in bins)
