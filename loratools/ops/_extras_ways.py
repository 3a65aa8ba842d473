"""What a caller may ask for of tensors that lie beside the factors of adapters that are merged."""

from __future__ import annotations

from collections.abc import Iterable

from loratools.errors import OptionError
from loratools.ops._extras_rows import SUM, WAYS


def checked_way(given: str | int, count: int, *, based: bool) -> str:
    """What is done with modules that several inputs hold in full.

    Args:
        given: One of ``WAYS``, or an input's number, counted from 1.
        count: How many inputs there are.
        based: Whether the base model is there.

    Raises:
        OptionError: It is none of these, or a sum without a base.
    """
    way = str(given)
    if way not in WAYS and not (way.isdecimal() and 1 <= int(way) <= count):
        raise OptionError(
            f"full modules: {way!r}",
            expected=f"One of {', '.join(WAYS)}, or the number of an input, 1 to {count}, was expected",
            todo="Choose one with --full-modules",
        )
    if way == SUM and not based:
        raise OptionError(
            "modules saved in full are to be summed, and there is no base model",
            expected="The model was expected from which their differences are taken",
            todo="Give it with --base, or choose --full-modules average",
        )
    return way


def checked_drop(drop: Iterable[str]) -> bool:
    """Whether tensors of no module are to be left out.

    Raises:
        OptionError: Something else is.
    """
    allowed = set(drop)
    if allowed - {"extras"}:
        raise OptionError(
            f"nothing called {sorted(allowed - {'extras'})[0]!r} can be dropped", candidates=["extras"]
        )
    return bool(allowed)
