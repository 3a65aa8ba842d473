"""Module names against those of a base model: equal, flattened, or under other wrappers.

Libraries and releases put different words before the same path: ``model.layers.0`` is ``model.language_model.layers.0``
in a later release, ``layers.0`` in the bare network. Two names are of one module if they end alike from before their
first number on, and what precedes differs in words that were only added, only taken away, or that say nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

# Words that are put around any network, and do not tell one part of a model from another.
_SILENT = frozenset(
    {"", "auto", "base", "diffusion", "fsdp", "model", "mod", "module", "orig", "transformer", "wrapped"}
)
_MOST_COMPARED = 500  # names; a model of many layers has thousands
# PEFT's wrappers of several parameters of one module.
_BASE_LAYER = ".base_layer"

Fits = Callable[[str, str], bool]
"""Whether the adapter's module of this name can change the base's module of this path, by their shapes."""


class Move(NamedTuple):
    """What stands before the common part of two names.

    Attributes:
        off: In the adapter's name, with its last separator.
        on: In the base's path, with its last dot.
    """

    off: str
    on: str


SAME = Move("", "")


@dataclass(frozen=True, slots=True)
class Matched:
    """What became of a component's names.

    Attributes:
        paths: The base's path of each name that has exactly one.
        missing: Names that the base has nothing for.
        ambiguous: Names with the paths that they may mean.
        misfits: Names with the one path they mean, whose shape is another.
        move: The change of prefix that all names have in common; None where each was found by itself.
    """

    paths: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    ambiguous: dict[str, tuple[str, ...]] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)
    move: Move | None = None


class Paths:
    """A base's module paths, to be looked up by whole names and by their ends.

    Attributes:
        flat: Whether names have underscores for dots.
    """

    def __init__(self, paths: Iterable[str], *, flat: bool) -> None:
        self.flat = flat
        self._whole: dict[str, list[str]] = {}
        for path in paths:
            self._whole.setdefault(path.replace(".", "_") if flat else path, []).append(path)

    def moved(self, name: str, move: Move) -> Sequence[str]:
        """The paths that a name means under a change of prefix: several where two flatten alike."""
        if not name.startswith(move.off):
            return ()
        on = move.on.replace(".", "_") if self.flat else move.on
        return self._whole.get(on + name[len(move.off) :], ())

    def ends(self, name: str) -> Iterator[tuple[Move, str]]:
        """The paths that end as the name does, those with the longest common end first."""
        seen: set[str] = set()
        for tail in tails(name, "_" if self.flat else "."):
            for path in self._ends.get(tail, ()):
                move = Move(name[: len(name) - len(tail)], path[: len(path) - len(tail)])
                if path not in seen and _says_nothing(move, tail):
                    yield move, path
                seen.add(path)

    def alike(self, name: str) -> Iterator[tuple[Move, str]]:
        """As ``ends``, for one name alone: all paths are looked through once, and no index of them is made."""
        *_, shortest = tails(name, "_" if self.flat else ".")
        near = [path for key, paths in self._whole.items() if key.endswith(shortest) for path in paths]
        return Paths(near, flat=self.flat).ends(name)

    @cached_property
    def _ends(self) -> dict[str, list[str]]:
        """The paths by each of their ends; flattening keeps lengths, so that prefixes can be cut by them."""
        found: dict[str, list[str]] = {}
        for paths in self._whole.values():
            for path in paths:
                for tail in tails(path, "."):
                    found.setdefault(tail.replace(".", "_") if self.flat else tail, []).append(path)
        return found


def tails(name: str, separator: str) -> Iterator[str]:
    """The name, and its ends without one word after another from before its first number on.

    A number is a block's place, which no wrapper changes, but for one in front: a sequence of networks.
    """
    rest, first = name, True
    while True:
        yield rest
        head, found, tail = rest.partition(separator)
        if not found or (head.isdigit() and not first):
            return
        rest, first = tail, False


def _says_nothing(move: Move, tail: str) -> bool:
    """Whether a change of prefix leaves open which part of the model is meant.

    Words may be added, or taken away, but not exchanged for others (``encoder`` for ``decoder``); an end without a
    number is too short to go by, and only silent words may be taken from before it.
    """
    off, on = _words(move.off), _words(move.on)
    gone, new = off - on, on - off
    if gone and not any(part.isdigit() for part in tail.replace(".", "_").split("_")):
        return False
    return not (gone and new)


def _words(prefix: str) -> Counter[str]:
    return Counter([word for word in prefix.replace(".", "_").split("_") if word not in _SILENT])


def match(names: Sequence[str], paths: Paths, fits: Fits) -> Matched:
    """The base's path of every name.

    One change of prefix for all names is preferred, and none at all to any; else each name is looked up by itself.

    Args:
        names: Of the adapter's modules, dotted or flattened as ``paths`` expects.
        paths: The base's.
        fits: Tells the candidates apart where there are several.
    """
    found = Matched()
    if all(paths.moved(name, SAME) for name in names):
        found = Matched(move=SAME)
    else:
        moves = _common(names, paths, fits)
        if len(moves) > 1:
            spelt = {
                name: tuple(path for move in moves for path in paths.moved(name, move)) for name in names
            }
            return Matched(ambiguous=spelt)
        found = Matched(move=moves[0] if moves else None)
    for name in names:
        _settle(found, name, _candidates(paths, name, found.move), fits)
    _refuse_shared(found)
    return found


def _common(names: Sequence[str], paths: Paths, fits: Fits) -> list[Move]:
    """The changes of prefix under which every name is a path, those that take away the least.

    Several are left only where shapes do not tell them apart.
    """
    tried: dict[int, list[Move]] = {}
    # One name stands for all: a change that is common to all is also its own. The longest has the fewest likenesses.
    for move, _ in paths.alike(max(names, key=len)):
        tried.setdefault(len(move.off), []).append(move)
    for moves in tried.values():
        whole = [move for move in dict.fromkeys(moves) if all(paths.moved(name, move) for name in names)]
        fitting = [
            move
            for move in whole
            if all(any(fits(name, path) for path in paths.moved(name, move)) for name in names)
        ]
        if whole:
            return fitting or whole
    return []


def _candidates(paths: Paths, name: str, move: Move | None) -> Sequence[str]:
    if move is not None:
        return paths.moved(name, move)
    same = paths.moved(name, SAME)
    if same:
        return same
    least: int | None = None
    found: list[str] = []
    for each, path in paths.ends(name):
        if least is not None and len(each.off) > least:
            break
        least = len(each.off)
        found.append(path)
    return found


def _settle(found: Matched, name: str, candidates: Sequence[str], fits: Fits) -> None:
    fitting = [path for path in candidates if fits(name, path)]
    if len(fitting) == 1:
        found.paths[name] = fitting[0]
    elif not candidates:
        found.missing.append(name)
    elif len(candidates) == 1:
        found.misfits[name] = candidates[0]
    else:
        found.ambiguous[name] = tuple(fitting or candidates)


def _refuse_shared(found: Matched) -> None:
    """Names that mean one path cannot all be right."""
    owners: dict[str, list[str]] = {}
    for name, path in found.paths.items():
        owners.setdefault(path, []).append(name)
    for path, names in owners.items():
        if len(names) > 1:
            for name in names:
                del found.paths[name]
                found.ambiguous[name] = (path,)


# Weights that some libraries store as one and others apart.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "query_key_value": ("query", "key", "value", "q_proj", "k_proj", "v_proj"),
    "Wqkv": ("q_proj", "k_proj", "v_proj"),
    "qkv": ("q", "k", "v", "q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v"),
    "c_attn": ("q_proj", "k_proj", "v_proj"),
}


def regrouped(name: str, paths: Paths) -> str:
    """A base's module that holds more or less of what a missing name means; empty if there is none."""
    separator = "_" if paths.flat else "."
    for fused, parts in _PARTS.items():
        for spelt, others in ((fused, parts), *((part, (fused,)) for part in parts)):
            if not name.endswith(separator + spelt):
                continue
            for other in others:
                near = next(paths.alike(name[: len(name) - len(spelt)] + other), None)
                if near is not None:
                    return near[1]
    return ""


def bare(path: str) -> str:
    """A module's path without the wrappers that PEFT nests its parameters in."""
    while path.endswith(_BASE_LAYER):
        path = path.removesuffix(_BASE_LAYER)
    return path


def near_paths(path: str, names: Iterable[str]) -> list[str]:
    """The base's paths that are most like this one, of those with the same numbers."""
    import difflib  # only errors need it

    numbers = _numbers(path)
    alike = [other for other in names if _numbers(other) == numbers][:_MOST_COMPARED]
    return difflib.get_close_matches(path, alike, cutoff=0.6)


def _numbers(path: str) -> list[str]:
    return [word for word in path.replace(".", "_").split("_") if word.isdigit()]
