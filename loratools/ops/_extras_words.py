"""The vocabularies of the inputs of a merge: whose rows are which of the result's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from loratools.errors import ShapeError, UnsupportedKindError
from loratools.model import Adapter
from loratools.ops import _replaced, _tokens
from loratools.ops._replaced import Saved

Held = Mapping[tuple[str, str], Sequence[tuple[int, Saved]]]


class Words(NamedTuple):
    """Where each input's rows go.

    Attributes:
        sides: By position of the input; only those that hold rows that went elsewhere are in it.
        notes: What the caller should know.
    """

    sides: Mapping[int, _tokens.Side]
    notes: tuple[str, ...] = ()

    def rows(self, position: int) -> tuple[int, ...] | None:
        """For each row of the result the input's own, or -1; None where they are the same."""
        side = self.sides.get(position)
        return None if side is None else side.rows

    def placed(self, position: int, rows: Sequence[int]) -> tuple[int, ...]:
        """The rows of the result that some of an input's are."""
        side = self.sides.get(position)
        if side is None:
            return tuple(rows)
        places = {own: place for place, own in enumerate(side.rows) if own >= 0}
        return tuple(places.get(row, row) for row in rows)


def united(adapters: Sequence[Adapter], held: Held) -> Words:
    """One vocabulary of those that the inputs hold in full; nothing to do where at most one does.

    Args:
        adapters: The inputs.
        held: Their tensors, by key and role.

    Raises:
        LayoutError: Nothing tells which row is which word.
        ShapeError: An input holds vocabularies of several sizes.
        UnsupportedKindError: Words move, and an input has factors for them.
    """
    heights = _heights(adapters, held)
    if len(heights) < 2:
        return Words({})
    inputs = [adapters[position] for position in heights]
    found = _tokens.united(inputs, list(heights.values()))
    if not found.changed and len({*heights.values()}) == 1:
        return Words({}, tuple(_tokens.described(found, [each.path for each in inputs])))
    _refuse_factors(inputs)
    sides = dict(zip(heights, found.sides, strict=True))
    return Words(sides, tuple(_tokens.described(found, [each.path for each in inputs])))


def _heights(adapters: Sequence[Adapter], held: Held) -> dict[int, int]:
    """How many rows the vocabularies have that inputs hold in full, by position.

    Raises:
        ShapeError: One holds several sizes.
    """
    sizes: dict[int, set[int]] = {}
    for (key, role), found in held.items():
        for position, saved in found if role != "rows" and _replaced.is_vocabulary(key) else ():
            if len(saved.ref.shape) == 2:
                sizes.setdefault(position, set()).add(saved.ref.shape[0])
    for position, own in sizes.items():
        if len(own) > 1:
            raise ShapeError(
                f"its vocabularies have {' and '.join(map(str, sorted(own)))} rows",
                path=adapters[position].path or None,
                expected="An embedding and a head of one vocabulary were expected",
                todo="Save the adapter again with save_embedding_layers=True",
            )
    return {position: min(own) for position, own in sorted(sizes.items())}


def _refuse_factors(adapters: Iterable[Adapter]) -> None:
    """Refuse factors with a row or a column for each word, where words move."""
    for adapter in adapters:
        keys = [str(target) for target in adapter.modules if _replaced.is_vocabulary(target.path + ".weight")]
        if keys:
            raise UnsupportedKindError(
                "the inputs' added words differ, and this one has LoRA on its vocabulary",
                path=adapter.path or None,
                keys=keys,
                expected="Embeddings saved in full were expected, whose rows can be put elsewhere",
                todo="Bake the adapter into the base instead",
            )
