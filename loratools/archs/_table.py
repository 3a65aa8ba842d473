"""Two-column tables of module names: what they say, and how a name is found in them.

A table's row is ``(native, twin)``: the module path in the base checkpoint's own names, and how diffusers
spells the same weight. ``{}`` stands for any whole number, so that pruned and deeper variants work. A twin is

- ``None``: diffusers spells it the same;
- a string: the same weight under another name;
- a tuple: diffusers splits the weight, whose rows these are, in equal shares (``"q"``) or weighted ones
  (``("mlp", 4)``), or as given (``("name", Rows(...))``);
- ``swapped("name")``: the same weight with its halves exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple, TypeAlias

from loratools.archs._names import DIFFUSERS, HOLE, NATIVE, Index, Name, parse
from loratools.model import EMPTY, Rows

__all__ = ["DIFFUSERS", "HOLE", "NATIVE", "Component", "Piece", "Row", "Table", "Twin", "same", "swapped"]

Piece: TypeAlias = "str | tuple[str, int] | tuple[str, Rows]"
Twin: TypeAlias = "str | tuple[Piece, ...] | None"
Row: TypeAlias = "tuple[str, Twin]"

# The layouts whose prefixes imply another dialect than diffusers', the most telling first.
_DIALECTS = {"kohya": "kohya", "comfy": NATIVE, "checkpoint": NATIVE}
_HALVES_EXCHANGED = Rows(((1, 2), (0, 1)), of=2)


def swapped(name: str) -> tuple[Piece, ...]:
    """A twin that is the same weight with its halves exchanged (scale and shift, in adaptive norms)."""
    return ((name, _HALVES_EXCHANGED),)


def same(*names: str) -> tuple[Row, ...]:
    """Rows of weights that both dialects spell alike."""
    return tuple((name, None) for name in names)


class Table:
    """The names of a component's weights in every dialect.

    Attributes:
        rows: The native column and the diffusers column.
        further: Other dialects' columns, by dialect, over the same native names: those that they have names for,
            which may be a few of them.
    """

    def __init__(self, rows: tuple[Row, ...], further: Mapping[str, tuple[Row, ...]] = EMPTY) -> None:
        self.rows = rows
        self.further = further

    def spellings(self, dialect: str) -> Mapping[str, tuple[Name, ...]]:
        """Every native template, and how a dialect spells it: several names where it splits the weight.

        A dialect that this table does not have is spelt as diffusers does: the libraries that made further
        dialects changed single components, and left the others as they were. One that it has names what its
        column says, and nothing else.
        """
        columns = self._columns
        return columns[dialect if dialect in columns else DIFFUSERS]

    def find(self, skeleton: str, numbers: tuple[str, ...]) -> tuple[Name, tuple[str, ...]] | None:
        """The name with this skeleton and these numbers, and the numbers that fill its holes."""
        unsure = skeleton in self.homonyms or skeleton in self._redotted
        found = None if unsure else self._native_index.find(skeleton, numbers)
        return found or self.index.find(skeleton, numbers)

    def knows(self, skeleton: str) -> bool:
        """Whether some name of some dialect has this skeleton."""
        return skeleton in self._native_index or skeleton in self.index

    @cached_property
    def homonyms(self) -> frozenset[str]:
        """The skeletons of native names that mean other weights in other dialects."""
        return frozenset(
            [parse(text.replace(HOLE, "0"))[0] for own, native, text in self._clashes if own != native]
        )

    @cached_property
    def _redotted(self) -> frozenset[str]:
        """The skeletons of native names that other dialects spell with other dots."""
        return frozenset(
            [parse(text.replace(HOLE, "0"))[0] for own, native, text in self._clashes if own == native]
        )

    @cached_property
    def _clashes(self) -> list[tuple[str, str, str]]:
        """The names of other dialects that are not native ones but flatten like one.

        As (the native name that flattens so, the native name of the weight, the other dialect's name).
        """
        own = {native.replace(".", "_"): native for native, _ in self.rows}
        return [
            (own[flat], native, text)
            for column in (self.rows, *self.further.values())
            for native, twin in column
            if twin is not None
            for text in _texts(twin)
            if (flat := text.replace(".", "_")) in own and (own[flat], native) != (text, text)
        ]

    @cached_property
    def _native_index(self) -> Index:
        """The base checkpoint's own names alone: for files that use them, the others need not be looked at."""
        index = Index()
        for native, twin in self.rows:
            template = _template(native)
            index.add(Name(template, None, None if twin in (None, native) else NATIVE, template))
        return index

    def native(self, path: str) -> tuple[str, tuple[str, ...]] | None:
        """The native template of a canonical path, and its holes' numbers; None for any other."""
        if path not in self._natives:
            found = self.find(*parse(path))
            own = found is not None and found[0].native % found[1] == path
            self._natives[path] = (found[0].native, found[1]) if found is not None and own else None
        return self._natives[path]

    @cached_property
    def _natives(self) -> dict[str, tuple[str, tuple[str, ...]] | None]:
        """The canonical paths met so far: a conversion asks several times for each."""
        return {}

    def spell(self, path: str, rows: Rows | None, dialect: str) -> str | None:
        """The dotted name that a dialect has for exactly these rows of a weight, or None."""
        found = self.native(path)
        if found is None:
            return None
        template, numbers = found
        for name in self.spellings(dialect).get(template, ()):
            if name.rows == rows:
                return name.text % numbers
        return None

    def pieces(self, path: str, dialect: str) -> tuple[Rows | None, ...]:
        """The pieces in which a dialect spells a weight; empty if the table has no such weight."""
        found = self.native(path)
        return tuple(name.rows for name in self.spellings(dialect).get(found[0], ())) if found else ()

    def may_know(self, skeleton: str) -> bool:
        """Whether some name begins as this skeleton does."""
        return skeleton.partition("_")[0] in self._heads

    @cached_property
    def _heads(self) -> frozenset[str]:
        """The first words of all names: they spare building the index for files of other architectures."""
        texts = [native for native, _ in self.rows]
        for column in (self.rows, *self.further.values()):
            for _, twin in column:
                texts.extend(_texts(twin) if twin else ())
        return frozenset([text.partition(".")[0].partition("_")[0] for text in texts])

    @cached_property
    def _columns(self) -> dict[str, dict[str, tuple[Name, ...]]]:
        as_native: tuple[Row, ...] = tuple((native, None) for native, _ in self.rows)
        return {
            dialect: {_template(native): _names(native, twin, dialect) for native, twin in rows}
            for dialect, rows in ((NATIVE, as_native), (DIFFUSERS, self.rows), *self.further.items())
        }

    @cached_property
    def index(self) -> Index:
        """The names of all dialects.

        Raises:
            ValueError: Two different weights claim one name in one dialect.
        """
        index = Index()
        for column in self._columns.values():
            for names in column.values():
                for name in names:
                    index.add(name)
        return index


def _template(text: str) -> str:
    return text.replace(HOLE, "%s")


def _texts(twin: str | tuple[Piece, ...]) -> tuple[str, ...]:
    """The names in a twin."""
    if isinstance(twin, str):
        return (twin,)
    return tuple([piece if isinstance(piece, str) else piece[0] for piece in twin])


def _names(native: str, twin: Twin, dialect: str) -> tuple[Name, ...]:
    """One column's names of a weight, in the order of its rows."""
    template = _template(native)
    if twin is None or isinstance(twin, str):
        return (Name(template, None, dialect, _template(twin or native)),)
    names = []
    shares = [piece[1] if isinstance(piece, tuple) else 1 for piece in twin]
    total = sum(share for share in shares if isinstance(share, int))
    start = 0
    for piece, share in zip(twin, shares, strict=True):
        text = _template(piece if isinstance(piece, str) else piece[0])
        if isinstance(share, Rows):
            names.append(Name(template, share, dialect, text))
        else:
            names.append(Name(template, Rows(((start, start + share),), of=total), dialect, text))
            start += share
    return tuple(names)


class Component(NamedTuple):
    """One network of a model, and how files mark and spell its weights.

    Attributes:
        name: "denoiser", "text_encoder", "text_encoder_2", "language_model", …
        prefixes: The prefixes that each layout puts before its names; the first one is written.
        table: The names of its weights; None where a path is its own name.
        kohya_dialect: The dialect that kohya files use: "native" or "diffusers".
        dialects: The dialects of further layouts, by layout, where they are not the usual ones.
    """

    name: str
    prefixes: Mapping[str, tuple[str, ...]]
    table: Table | None = None
    kohya_dialect: str = NATIVE
    dialects: Mapping[str, str] = EMPTY

    def dialect(self, layout: str, usual: str) -> str:
        """The dialect that a layout uses here.

        Args:
            layout: The layout's name.
            usual: What the layout uses elsewhere: "native", "diffusers", or "kohya" for what Kohya files use here.
        """
        chosen = self.dialects.get(layout, usual)
        return self.kohya_dialect if chosen == "kohya" else chosen

    def implied(self, prefix: str) -> str:
        """The dialect that names after a prefix are most likely in."""
        for layout in (*_DIALECTS, *self.prefixes):
            if prefix in self.prefixes.get(layout, ()):
                return self.dialect(layout, _DIALECTS.get(layout, DIFFUSERS))
        return NATIVE

    def prefix(self, layout: str) -> str | None:
        """The prefix that a layout writes; None if it has no name for this component.

        Where paths are their own names, they are so in every layout: empty if nothing else is said.
        """
        return next(iter(self.prefixes.get(layout, ())), None if self.table else "")
