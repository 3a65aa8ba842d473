"""What a weight's shape says about its architecture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from loratools.model import Rows

# Tiny models, made for tests, have any width; those that people use are no narrower than this.
_LEAST_REAL_WIDTH = 768


class Resolved(NamedTuple):
    """What a key's stem means: which rows of which weight, and how it was spelt.

    Attributes:
        component: The component's name.
        path: The weight's canonical native path, without a checkpoint's prefix.
        rows: Which of its rows, or None for all.
        dialect: "native", "diffusers" or a further one; where they agree, the one that kohya files use.
        prefix: The prefix as spelt; empty for none.
        separator: "." or "_".
    """

    component: str
    path: str
    rows: Rows | None
    dialect: str
    prefix: str
    separator: str


class Width(NamedTuple):
    """A width that tells an architecture from others that spell their names alike.

    An architecture of several sizes has one rule for each, and any of them may hold.

    Attributes:
        component: The component's name.
        tails: The last segments of the native paths that have it.
        size: Their input width, in columns.
    """

    component: str
    tails: tuple[str, ...]
    size: int

    def speaks_of(self, resolved: Resolved) -> bool:
        """Whether the rule says something about this weight."""
        if resolved.component != self.component:
            return False
        return any(resolved.path == tail or resolved.path.endswith("." + tail) for tail in self.tails)


def denied_by_width(rules: Iterable[Width], resolved: Resolved, width: int) -> bool:
    """Whether a weight has a width that none of the rules that speak of it knows."""
    if width < _LEAST_REAL_WIDTH:
        return False
    sizes = [rule.size for rule in rules if rule.speaks_of(resolved)]
    return bool(sizes) and width not in sizes


class Proportion(NamedTuple):
    """Height to width of some weights, which holds at any size of the model.

    Attributes:
        tails: The last segments of the native paths that have it.
        height: Of the whole weight, in parts.
        width: In the same parts.
    """

    tails: tuple[str, ...]
    height: int
    width: int

    def denies(self, resolved: Resolved, out: int, into: int) -> bool:
        """Whether the rule says something about this weight, and something else than its shape (out, in)."""
        if not any(resolved.path.endswith("." + tail) for tail in self.tails):
            return False
        rows = resolved.rows
        whole = out * rows.of // rows.shares if rows is not None else out
        return whole * self.width != into * self.height
