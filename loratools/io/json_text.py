"""JSON that others wrote: parsed within bounds, and shown in messages within a line.

``json`` itself accepts what no reader here could go on with: nesting that its own recursion, or that of whoever looks
at the value next, cannot follow; whole numbers that no float holds; half of a pair of surrogates, which can be written
nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from reprlib import Repr
from typing import Any

DEEPEST = 100
"""Levels of nesting that are read; configurations have five, headers of tensors three."""
_LARGEST = 2**1023  # the next power of two is no float any more
_SHOWN = 80


class TwiceError(ValueError):
    """A name that an object has twice, with different values; readers disagree about which of two counts."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it states {brief(name)} more than once, with different values")
        self.name = name


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        TwiceError: A name is there twice.
        ValueError: It is no JSON, or is beyond what anybody means: too deep, too long a number, no Unicode text.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
        for problem in _problems(value):
            raise ValueError(problem)
        if "\\u" in text:  # the only way past a UTF-8 decoder
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(_too_deep()) from None
    return value


def brief(value: object) -> str:
    """A value as messages show it: Python's spelling, of at most a line, whatever its size and nesting."""
    text = _REPR.repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


class _Brief(Repr):
    """The start of a value's spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist = 3, 3, 5
        self.maxstring = self.maxother = self.maxlong = _SHOWN - 5

    def repr_int(self, x: int, level: int) -> str:
        """Numbers of more digits than Python prints are told by their size."""
        return super().repr_int(x, level) if abs(x) < _LARGEST else f"(a number of {x.bit_length():,} bits)"


_REPR = _Brief()


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    found = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            raise TwiceError(name)
        found[name] = value
    return found


def _problems(value: object) -> Iterator[str]:
    """What is beyond bounds, looked for level by level rather than by recursion."""
    level = [value]
    for _ in range(DEEPEST):
        if not level:
            return
        below: list[object] = []
        for each in level:
            if isinstance(each, dict):
                below.extend(each.values())
            elif isinstance(each, list):
                below.extend(each)
            elif type(each) is int and not -_LARGEST < each < _LARGEST:
                yield f"it has {brief(each)}, which no float holds"
        level = below
    if level:
        yield _too_deep()


def _too_deep() -> str:
    return f"it is nested more than {DEEPEST} levels deep"
