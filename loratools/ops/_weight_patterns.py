"""Weights for whatever a pattern matches: a regular expression on a module's path, or a range of layers.

    attn=0.5                        every module in whose path the regular expression has a match
    layers.0-11=0.5                 every module of these layers, both ends included
    layers.0-31=0→1                 a gradient over them, also spelt 0..1 or 0->1
    layers.0-11.self_attn=0         and only what lies under that name
    2:layers.0-11=0.5               for the second input alone

Of several patterns that match a module the last one counts; it multiplies the module's ΔW once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratools.errors import OptionError

_SOURCE = re.compile(r"(\d+):(.*)", re.DOTALL)
# No path has a hyphen between two numbers, so that a range is never a regular expression that somebody meant.
_RANGE = re.compile(r"([\w.]*?)(\d+)-(\d+)((?:[._]\w+)*)")
_GRADIENT = re.compile(r"→|->|\.\.")


@dataclass(frozen=True, slots=True)
class Rule:
    """One pattern and its weight.

    Attributes:
        name: The pattern as the user wrote it.
        said: The weight as the user wrote it.
        source: The position of the input that it is for; None for all.
        pattern: What a path is searched for; its group 1 is the layer's number where there are layers.
        layers: The first and the last; None where the pattern is a regular expression of the user's.
        weights: At the first layer, and at the last.
    """

    name: str
    said: str
    source: int | None
    pattern: re.Pattern[str]
    layers: tuple[int, int] | None
    weights: tuple[float, float]

    def weight(self, source: int, path: str) -> float | None:
        """What a module of an input is multiplied by, or None where the pattern does not match it."""
        if self.source not in (None, source):
            return None
        found = self.pattern.search(path)
        if found is None:
            return None
        if self.layers is None:
            return self.weights[0]
        (first, last), (start, end) = self.layers, self.weights
        layer = int(found[1])
        if not first <= layer <= last:
            return None
        share = (layer - first) / (last - first) if last > first else 0.0
        return start + (end - start) * share


def rules(given: Mapping[str, float | str], count: int | None = None) -> list[Rule]:
    """Patterns and their weights, in order.

    Args:
        given: Weights by pattern: a number, or a gradient such as "0..1".
        count: How many inputs there are; None where that is not known yet.

    Raises:
        OptionError: A pattern that does not compile, a weight that is no finite number, a gradient without layers, an
            input that is not there.
    """
    return [_rule(name, weight, count) for name, weight in given.items()]


def weight_at(found: Sequence[Rule], source: int, path: str) -> tuple[Rule, float] | None:
    """The rule that counts for a module, and what it multiplies by; None where none matches."""
    for rule in reversed(found):
        weight = rule.weight(source, path)
        if weight is not None:
            return rule, weight
    return None


def _rule(name: str, weight: float | str, count: int | None) -> Rule:
    source, text = _source(name, count)
    said = str(weight).strip()
    weights = _weights(name, said)
    spanned = _RANGE.fullmatch(text)
    if spanned is not None:
        return _over_layers(name, said, source, spanned, weights)
    if len(weights) > 1:
        raise OptionError(
            f"the weight of {name!r} is the gradient {said}, and the pattern has no layers",
            expected="A gradient goes over a range, such as layers.0-31=0..1",
            todo="Write the range, or one weight",
        )
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise OptionError(
            f"{text!r} is no regular expression: {error}",
            expected="A regular expression, or a range of layers such as layers.0-11, was expected",
            todo="Escape what is meant literally with a backslash",
        ) from None
    return Rule(name, said, source, pattern, None, (weights[0], weights[0]))


def _source(name: str, count: int | None) -> tuple[int | None, str]:
    """The position of the input that a pattern is for, and the pattern itself."""
    found = _SOURCE.fullmatch(name)
    number, text = (int(found[1]), found[2]) if found else (None, name)
    if not text.strip():
        raise OptionError(
            f"the pattern {name!r} is empty",
            expected="A regular expression, or a range of layers such as layers.0-11, was expected",
            todo="Use --weights for a weight of everything",
        )
    if number is None:
        return None, text
    if number < 1 or (count is not None and number > count):
        raise OptionError(
            f"the pattern {name!r} is for input {number}, which is not there",
            expected=f"Inputs are counted from 1 to {count}" if count else "Inputs are counted from 1",
            todo="Leave the number out for all inputs",
        )
    return number - 1, text


def _weights(name: str, said: str) -> tuple[float, ...]:
    try:
        weights = tuple(float(part) for part in _GRADIENT.split(said))
    except ValueError:
        weights = ()
    if not 1 <= len(weights) <= 2 or not all(map(math.isfinite, weights)):
        raise OptionError(
            f"the weight of {name!r} is {said!r}",
            expected="A finite number, or a gradient of two such as 0..1, was expected",
            todo="Write the pattern, an equals sign and the weight: layers.0-11=0.5",
        )
    return weights


def _over_layers(
    name: str, said: str, source: int | None, spanned: re.Match[str], weights: tuple[float, ...]
) -> Rule:
    head, first, last, tail = spanned[1], int(spanned[2]), int(spanned[3]), spanned[4]
    if first > last or (first == last and len(weights) > 1):
        raise OptionError(
            f"the layers of {name!r} go from {first} to {last}"
            + (f", and its weight from {said}" if first == last else ""),
            expected="The first layer's number, then a larger one, were expected",
            todo="Turn a gradient round by its weights: layers.0-31=1..0",
        )
    # Names of an architecture that is not known may be flattened, with underscores for dots.
    dot = "_" if head.endswith("_") else r"\."
    pattern = re.compile(rf"(?:^|{dot}){re.escape(head)}(\d+){re.escape(tail)}(?:{dot}|$)")
    return Rule(name, said, source, pattern, (first, last), (weights[0], weights[-1]))
