"""Tables that fit: columns without room are left out by priority and named, numbers are never cut."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from loratools.report.values import Symbols
from loratools.report.values import fitted as fitted_to

_INDENT = 1
_GAP = 2
# After what a name may go on in the next line, best first.
_JOINTS = ("/\\", ".", "_- ")
# In prose, a number goes with what it counts, and a value with its count.
_NUMBER = r"\(?\d[\d,.]*"
_SPACE = r" (?![×x]\d)"


class Column(NamedTuple):
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
    filled = [_shown(column, symbols) for column in columns if any(column.cells)]
    kept, dropped = fitted(filled, width)
    # What the others leave is for the names.
    room = width - _total(kept) + sum(column.least for column in kept if column.fold)
    cells = [_folded_cells(column, room) for column in kept]
    widths = [
        max([cell_len(column.head), *(cell_len(line) for lines in own for line in lines)])
        for column, own in zip(kept, cells, strict=True)
    ]
    lines = [Text(title, style="bold")] if title else []
    heads = [(column.head, "dim") for column in kept]
    lines.append(_line(kept, widths, heads))
    lines.append(Text(symbols.rule * (sum(widths) + _GAP * (len(widths) - 1)), style="dim"))
    for row in range(len(kept[0].cells) if kept else 0):
        lines += _row(kept, widths, [own[row] for own in cells], row)
    if dropped:
        lines.append(Text(f"no room for: {', '.join(column.head for column in dropped)}", style="dim"))
    return _indented(lines)


def _shown(column: Column, symbols: Symbols) -> Column:
    """The column in characters that the output has: what stands for others takes another width."""
    head, *cells = (fitted_to(text, symbols.encoding) for text in (column.head, *column.cells))
    return column._replace(head=head, cells=cells)


def pairs(rows: Iterable[tuple[str, str]], *, width: int) -> RenderableType:
    """Names and what they are, one below the other; long values fold."""
    found = [(name, value) for name, value in rows if value]
    wide = max((cell_len(name) for name, _ in found), default=0)
    lines: list[Text] = []
    for name, value in found:
        first, *others = wrapped(value, max(1, width - _INDENT - wide - _GAP)).split("\n")
        lines.append(Text.assemble((_padded(name, wide + _GAP), "dim"), first))
        lines += [Text(" " * (wide + _GAP) + other) for other in others]
    return _indented(lines)


def _indented(lines: Sequence[Text]) -> RenderableType:
    for line in lines:
        line.no_wrap = True
    return Padding(Group(*lines), (0, 0, 1, _INDENT), expand=False)


def _row(
    columns: Sequence[Column], widths: Sequence[int], cells: Sequence[Sequence[str]], row: int
) -> Iterator[Text]:
    """A row's lines: several where a name folds."""
    styles = [column.style[row] if column.style else "" for column in columns]
    for line in range(max(len(lines) for lines in cells)):
        texts = [lines[line] if line < len(lines) else "" for lines in cells]
        yield _line(columns, widths, list(zip(texts, styles, strict=True)))


def _line(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[tuple[str, str]]) -> Text:
    found = Text()
    last = len(columns) - 1
    for number, (column, width, (text, style)) in enumerate(zip(columns, widths, cells, strict=True)):
        found.append(_padded(text, width, right=column.right), style=style or None)
        found.append(" " * _GAP if number < last else "")
    return found


def _padded(text: str, width: int, *, right: bool = False) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


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
    while name and cell_len(name) > width:
        stop = _cut(name, width)
        # A separator near the start would leave a line almost empty.
        joints = (max(name.rfind(char, 0, stop) for char in chars) + 1 for chars in _JOINTS)
        stop = next((joint for joint in joints if joint > stop // 3), stop)
        lines.append(name[:stop].rstrip())
        name = name[stop:]
    return "\n".join([*lines, name] if name else lines)


def wrapped(text: str, width: int) -> str:
    """Prose over several lines of at most ``width`` cells; a name folds only where it is longer than a line."""
    lines: list[str] = []
    for word in _words(text):
        longer = f"{lines[-1]} {word}" if lines else word
        if cell_len(longer) <= width:
            lines[-1:] = [longer]
        else:
            lines += folded(word, width).split("\n")
    return "\n".join(lines)


def _words(text: str) -> Iterator[str]:
    """What is not taken apart at the end of a line."""
    number = ""
    for word in re.split(_SPACE, text):
        if not number and re.fullmatch(_NUMBER, word) and word[-1].isdigit():
            number = word + " "
            continue
        yield number + word
        number = ""
    if number:
        yield number[:-1]


def _cut(name: str, width: int) -> int:
    """How many characters take up at most ``width`` cells; one at least."""
    taken = 0
    for index, char in enumerate(name):
        taken += cell_len(char)
        if taken > width:
            return max(1, index)
    return len(name)


def _folded_cells(column: Column, room: int) -> list[list[str]]:
    """Each cell's lines."""
    width = max(room, column.least)
    return [(folded(cell, width) if column.fold else cell).split("\n") for cell in column.cells]


def _total(columns: Sequence[Column]) -> int:
    return sum(column.least + _GAP for column in columns) - _GAP + _INDENT
