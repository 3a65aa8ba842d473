"""Regular expressions that a file brings along, matched in bounded time.

Python's ``re`` tries one way after another, and some patterns have more ways than anybody can wait for: ``(a+)+b`` has
2ⁿ on n letters. Patterns with several repeats, or with one inside another, are followed here along all ways at once,
which takes a time of their length times the name's.

Source: K. Thompson, "Regular Expression Search Algorithm", 1968.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple, Union

from loratools.errors import MalformedFileError

_COUNTS = re.compile(r"\{(\d*)(,?)(\d*)\}")
_ESCAPE = re.compile(r"\\(?:x..|u.{4}|U.{8}|N\{[^}]*\}|0[0-7]{0,2}|.)", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP = re.compile(r"\((?:\?:|\?P<\w+>)?(?!\?)")
_PLACES = ("^", "$", r"\A", r"\Z", r"\b", r"\B")
# As many repeats, none inside another, are tried one after another by ``re``.
_FEW = 2
_STATES = 5000


class _One(NamedTuple):
    """One character, or (with ``empty``) a place between two."""

    test: re.Pattern[str]
    empty: bool


class _Repeat(NamedTuple):
    """A part ``least`` to ``most`` times; None: any number of times."""

    part: _Node
    least: int
    most: int | None


class _Sequence(NamedTuple):
    parts: tuple[_Node, ...]


class _Either(NamedTuple):
    parts: tuple[_Node, ...]


_Node = Union["_One", "_Repeat", "_Sequence", "_Either"]


class _UnknownSyntaxError(Exception):
    """What has no place among states: looking around, references back, flags."""


class _Parser:
    """A pattern that ``re`` has compiled, as a tree."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def tree(self) -> _Node:
        found = self._either()
        if self._at < len(self._text):
            raise _UnknownSyntaxError
        return found

    def _either(self) -> _Node:
        parts = [self._sequence()]
        while self._text.startswith("|", self._at):
            self._at += 1
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else _Either(tuple(parts))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._atom()))
        return _Sequence(tuple(parts))

    def _atom(self) -> _Node:
        first = self._text[self._at]
        if first == "(":
            opened = _GROUP.match(self._text, self._at)
            if opened is None:
                raise _UnknownSyntaxError
            self._at = opened.end()
            inner = self._either()
            self._at += 1
            return inner
        token = first
        if first in "\\[":
            found = (_ESCAPE if first == "\\" else _CLASS).match(self._text, self._at)
            if found is None or re.fullmatch(r"\\[1-9]", found[0]):
                raise _UnknownSyntaxError
            token = found[0]
        self._at += len(token)
        escaped = re.escape(token) if len(token) == 1 and token not in "^$." else token
        return _One(re.compile(escaped), token in _PLACES)

    def _repeated(self, part: _Node) -> _Node:
        mark = self._text[self._at : self._at + 1]
        counts = _COUNTS.match(self._text, self._at) if mark == "{" else None
        if mark and mark in "*+?":
            self._at += 1
            least, most = int(mark == "+"), 1 if mark == "?" else None
        elif counts is not None and (counts[1] or counts[2]):
            self._at = counts.end()
            least = int(counts[1] or 0)
            most = (int(counts[3]) if counts[3] else None) if counts[2] else least
        else:
            return part
        if self._text.startswith("+", self._at):  # possessive: what it has taken it never gives back
            raise _UnknownSyntaxError
        # Whether as many as possible are tried first, or as few, is the same to whether there is a match.
        self._at += self._text.startswith("?", self._at)
        return _Repeat(part, least, most)


def _repeats(node: _Node) -> tuple[int, bool]:
    """How many repeats there are, and whether one is inside another."""
    if isinstance(node, _One):
        return 0, False
    if isinstance(node, _Repeat):
        count, nested = _repeats(node.part)
        return count + 1, nested or count > 0
    inner = [_repeats(part) for part in node.parts]
    return sum(count for count, _ in inner), any(nested for _, nested in inner)


class _States:
    """A tree as states: each tests a character or place and goes on to one, or goes on to several untested."""

    def __init__(self, tree: _Node) -> None:
        self._tests: list[_One | None] = [None]
        self._next: list[tuple[int, ...]] = [()]
        self._start = self._add(tree, 0)

    def _state(self, test: _One | None, *following: int) -> int:
        if len(self._tests) >= _STATES:
            raise _UnknownSyntaxError
        self._tests.append(test)
        self._next.append(following)
        return len(self._tests) - 1

    def _add(self, node: _Node, after: int) -> int:
        """The state that a part begins with, before the state ``after``."""
        if isinstance(node, _One):
            return self._state(node, after)
        if isinstance(node, _Either):
            return self._state(None, *(self._add(part, after) for part in node.parts))
        if isinstance(node, _Sequence):
            for part in reversed(node.parts):
                after = self._add(part, after)
            return after
        if node.most is None:
            loop = self._state(None)
            self._next[loop] = (self._add(node.part, loop), after)
            after = loop
        else:
            end = after
            for _ in range(node.most - node.least):
                after = self._state(None, self._add(node.part, after), end)
        for _ in range(node.least):
            after = self._add(node.part, after)
        return after

    def _reached(self, states: Iterable[int], name: str, at: int) -> set[int]:
        """All states that are reached without a character."""
        found: set[int] = set()
        waiting = list(states)
        while waiting:
            state = waiting.pop()
            if state in found:
                continue
            found.add(state)
            test = self._tests[state]
            if test is None or (test.empty and test.test.match(name, at)):
                waiting.extend(self._next[state])
        return found

    def matches(self, name: str) -> bool:
        """Whether the whole name is matched."""
        states = self._reached([self._start], name, 0)
        for at, letter in enumerate(name):
            states = self._reached(self._followed(states, letter), name, at + 1)
        return 0 in states

    def _followed(self, states: Iterable[int], letter: str) -> Iterator[int]:
        for state in states:
            test = self._tests[state]
            if test is not None and not test.empty and test.test.match(letter):
                yield from self._next[state]


class Pattern:
    """A regular expression of a configuration.

    Args:
        text: As the configuration has it.
        tail: Whether it is PEFT's rule for patterns of ranks and alphas: a match of the name from any dot on.

    Raises:
        re.error: It is none.
        MalformedFileError: It cannot be matched in bounded time.
    """

    def __init__(self, text: str, *, tail: bool = False) -> None:
        self._plain = re.compile(text)
        if tail:
            self._plain = re.compile(rf"(?:.*\.)?(?:{text})")
        self._states: _States | None = None
        count, nested = _marks(text)
        try:
            tree = _Parser(text).tree()
            count, nested = _repeats(tree)
            if count > _FEW or nested:
                front = _Parser(r"(?:.*\.)?").tree() if tail else _Sequence(())
                self._states = _States(_Sequence((front, tree)))
        except _UnknownSyntaxError:
            if count > 3 * _FEW or nested:
                raise _unbounded(text) from None

    def matches(self, name: str) -> bool:
        """Whether the name is matched, as a whole."""
        return self._plain.fullmatch(name) is not None if self._states is None else self._states.matches(name)


def _marks(text: str) -> tuple[int, bool]:
    """How many repeats a text of any syntax has at most, and whether one might be inside another."""
    bare = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "x", text, flags=re.DOTALL).replace("(?", "(")
    return len(re.findall(r"[*+?{]", bare)), re.search(r"\)[*+{]", bare) is not None


def _unbounded(text: str) -> MalformedFileError:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return MalformedFileError(
        f"the pattern {shown!r} of adapter_config.json has too many ways to be tried",
        expected="A pattern without repeats inside repeats, references back and the like was expected",
        todo="Write it as names, or as a simpler pattern, in adapter_config.json",
    )


@lru_cache(maxsize=256)
def pattern(text: str, *, tail: bool = False) -> Pattern:
    """A regular expression made ready; see :class:`Pattern`."""
    try:
        return Pattern(text, tail=tail)
    except (RecursionError, OverflowError) as error:
        raise re.error("it is nested too deeply, or repeats too often") from error
