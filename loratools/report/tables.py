"""Tables that fit: columns without room are left out by priority and named, numbers are never cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loratools.report.values import ASCII, Symbols

_INDENT = 1
_GAP = 2
# After what a name may go on in the next line, best first.
_JOINTS = ("/\\", ".", "_- ")
_ASCII_RULE = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Attributes:
        head: Its heading, on one line.
        cells: One per row.
        right: Whether it holds numbers.
        priority: 0 stays whatever the width; the highest goes first.
        fold: Least width in cells of the one column of names that may fold; 0 for the others.
        style: Of each cell; empty for none.
    """

    head: str
    cells: Sequence[str]
    right: bool = False
    priority: int = 0
    fold: int = 0
    style: Sequence[str] = ()

    @property
    def natural(self) -> int:
        """The width at which nothing folds, in cells."""
        return max([cell_len(self.head), *(cell_len(cell) for cell in self.cells)])

    @property
    def least(self) -> int:
        """The width below which it would be cut, in cells."""
        return min(self.natural, max(self.fold, cell_len(self.head))) if self.fold else self.natural


def table(columns: Sequence[Column], *, width: int, symbols: Symbols, title: str = "") -> RenderableType:
    """A table no wider than ``width`` cells, with a note that names the columns it had no room for.

    A column without any content is left out silently.
    """
    filled = [column for column in columns if any(column.cells)]
    kept, dropped = fitted(filled, width)
    shown = Table(
        box=_ASCII_RULE if symbols is ASCII else box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, _GAP - 1, 0, 0),
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="dim",
    )
    # What the others leave is for the names.
    room = width - _total(kept) + sum(column.least for column in kept if column.fold)
    for column in kept:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        shown.add_column(Text(column.head), justify=justify, no_wrap=True, min_width=column.least)
    for row in zip(*(_cells(column, room) for column in kept), strict=True):
        shown.add_row(*row)
    below = (
        [Text(f"no room for: {', '.join(column.head for column in dropped)}", style="dim")] if dropped else []
    )
    return Padding(Group(shown, *below), (0, 0, 1, _INDENT), expand=False)


def fitted(columns: Sequence[Column], width: int) -> tuple[list[Column], list[Column]]:
    """The columns that fit into ``width`` cells, and those that do not, both in their order."""
    kept = list(range(len(columns)))
    while _total([columns[index] for index in kept]) > width:
        last = max(kept, key=lambda index: (columns[index].priority, index))
        if not columns[last].priority:
            break
        kept.remove(last)
    dropped = [column for index, column in enumerate(columns) if index not in kept]
    return [columns[index] for index in kept], dropped


def folded(name: str, width: int) -> str:
    """A name over several lines of at most ``width`` cells, broken after a separator where there is one."""
    lines: list[str] = []
    while cell_len(name) > width:
        stop = _cut(name, width)
        # A separator near the start would leave a line almost empty.
        joints = (max(name.rfind(char, 0, stop) for char in chars) + 1 for chars in _JOINTS)
        stop = next((joint for joint in joints if joint > stop // 3), stop)
        lines.append(name[:stop].rstrip())
        name = name[stop:]
    return "\n".join([*lines, name] if name else lines)


def _cut(name: str, width: int) -> int:
    """How many characters take up at most ``width`` cells; one at least."""
    taken = 0
    for index, char in enumerate(name):
        taken += cell_len(char)
        if taken > width:
            return max(1, index)
    return len(name)


def _cells(column: Column, room: int) -> Iterator[Text]:
    styles = column.style or [""] * len(column.cells)
    for cell, style in zip(column.cells, styles, strict=True):
        yield Text(folded(cell, max(room, column.least)) if column.fold else cell, style=style)


def _total(columns: Sequence[Column]) -> int:
    # rich 13 reserves the padding of the last column too, though it draws none.
    return sum(column.least + _GAP for column in columns) - 1 + _INDENT
