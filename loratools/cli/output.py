"""Where commands print: reports and JSON to stdout, progress and messages to stderr."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, cast

import click

from loratools.errors import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import ProgressColumn
    from rich.segment import Segments

    from loratools.report.values import Symbols

OnProgress = Callable[[str, int, int], None]
Renderer = Callable[[int, "Symbols"], "RenderableType"]

# Widths in cells: with an amount and a rate of bytes, all of a bar fits into 80.
_ROOM = 40
_LEAST_BESIDE_BYTES = 16
_BAR_BESIDE_BYTES = 18
_BAR_AND_BYTES = 64  # all that stands before the name
_NARROWEST = 20  # cells
_PLAIN_TERMINALS = ("dumb", "unknown")  # what TERM says where nothing can be drawn over


def write_json(value: Any, *, written: str | None = None) -> None:
    """One JSON document on stdout.

    Args:
        value: What ``report.data`` makes of a result.
        written: The output that is in its place already, if there is one.
    """
    from loratools.report import data

    text = data.dumps(value)
    with _reporting(written):
        say(text)


def write_report(render: Renderer, *, written: str | None = None) -> None:
    """A report on stdout.

    Args:
        render: Makes the report for a width in cells and the symbols that the output can show.
        written: The output that is in its place already, if there is one.
    """
    from loratools.report.values import symbols_for

    # Rich writes nothing itself: it ends the program with status 1 where nobody reads any more.
    page = _Page(sys.stdout)
    console = _console(page)
    console.width = max(_NARROWEST, console.width)  # COLUMNS may say anything
    console.print(_harmless(console, render(console.width, symbols_for(page.encoding))), end="")
    with _reporting(written):
        say(page.getvalue(), end="", color=True)  # rich has decided on colours


def _harmless(console: Console, report: RenderableType) -> Segments:
    """A report as it is laid out, and whatever it repeats visible: the last place where nothing can be forgotten."""
    from rich.segment import Segment, Segments

    return Segments(
        Segment("\n".join(map(visible, text.split("\n"))), style)
        for text, style, control in console.render(report)
        if not control
    )


def write_text(text: str, *, end: str = "\n") -> None:
    """Plain text that is ours, on stdout."""
    with _reporting(None):
        say(text, end=end)


def write_error(message: str) -> None:
    """What went wrong with one of several files, on stderr."""
    tell(f"Error: {visible(message)}")


def tell(text: str, *, end: str = "\n") -> None:
    """A message on stderr, in which what comes from files is visible already.

    Where nobody can be told any more (a closed pipe, a full disk, a terminal that is gone) the exit status has to do.
    """
    try:
        say(text, end=end, stream=sys.stderr)
    except (OSError, ValueError):
        discard(sys.stderr)


def say(text: str, *, end: str = "\n", stream: IO[str] | None = None, color: bool | None = None) -> None:
    """Text in characters that a stream has.

    Raises:
        OSError: The stream takes no more.
    """
    from loratools.report.values import fitted

    place: IO[str] = stream or sys.stdout
    click.echo(fitted(text + end, encoding_of(place)), file=place, nl=False, color=color)


def encoding_of(stream: IO[str]) -> str:
    """Of a stream; what has none takes any text, since it is no file."""
    return getattr(stream, "encoding", None) or "utf-8"


@contextlib.contextmanager
def _reporting(written: str | None) -> Iterator[None]:
    """Print to stdout; once an output is written, a report that cannot be shown is no failure.

    Raises:
        OSError: Stdout takes no more (a full disk), and the report was all that there is.
    """
    try:
        yield
    except OSError as error:
        discard(sys.stdout)
        if no_reader(error):  # whoever read has seen enough
            return
        if written is None:
            raise
        reason = error.strerror or error
        tell(f"Warning: {visible(written)} was written; the report could not be: {reason}.")


def no_reader(error: OSError) -> bool:
    """Whether an error is a pipe's whose other end is closed; Windows has no number of its own for it."""
    gone = (errno.EPIPE, errno.EINVAL) if sys.platform == "win32" else (errno.EPIPE,)
    return error.errno in gone


def discard(stream: IO[str]) -> None:
    """Send what is left in a stream's buffer nowhere, lest Python fail to write it once more at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def progress(doing: str, *, quiet: bool = False, in_bytes: bool = False) -> Iterator[OnProgress | None]:
    """A progress bar on stderr while the block runs; None where stderr is no terminal that can draw one.

    Args:
        doing: What is being done, as a word or two.
        quiet: Whether the user wants none.
        in_bytes: Whether what is counted are bytes: the bar then shows their rate, too.
    """
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM", "").lower() in _PLAIN_TERMINALS:
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    counted = (TextColumn(doing), *_columns(in_bytes), TextColumn("{task.fields[current]}", markup=False))
    console = _console(_Gone(sys.stderr), bar=True)
    room = max(_LEAST_BESIDE_BYTES, console.width - _BAR_AND_BYTES) if in_bytes else _ROOM
    # Until it is known how much there is to do, an amount and a rate would be question marks.
    planning = (TextColumn(f"{doing}: looking at the files"), BarColumn(_BAR_BESIDE_BYTES))
    with Progress(*planning, console=console, transient=True) as shown:
        task = shown.add_task(doing, total=None, current="")

        def update(name: str, done: int, total: int) -> None:
            shown.columns = counted
            # Names in a checkpoint begin alike: what tells them apart is their end.
            current = _cut(name, room, console.encoding, from_start=in_bytes)
            shown.update(task, completed=done, total=total, current=current)

        yield update


def _cut(name: str, room: int, encoding: str, *, from_start: bool) -> str:
    """A name in so many cells, in characters that the terminal has."""
    from rich.text import Text

    from loratools.report.values import clean, fitted, symbols_for

    current, more = Text(fitted(clean(name), encoding)), symbols_for(encoding).more
    if current.cell_len <= room:
        return current.plain
    if from_start:
        current = Text(current.plain[len(more) - room :])
    current.truncate(room - len(more))
    return more + current.plain if from_start else current.plain + more


def _columns(in_bytes: bool) -> tuple[ProgressColumn, ...]:
    """What stands between the word and the name: bar, amount, rate of bytes, remaining time."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    if not in_bytes:
        return BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return BarColumn(_BAR_BESIDE_BYTES), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()


class _Page(io.StringIO):
    """Text that is kept, laid out for the stream that it will go to."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override] # of io.StringIO, which has none
        """The stream's."""
        return encoding_of(self._stream)

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()


class _Gone:
    """A terminal that may vanish while a bar is drawn on it: drawing is then no reason to end the work."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or not."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def _console(file: _Page | _Gone, *, bar: bool = False) -> Console:
    """Rich's console, which reads NO_COLOR, FORCE_COLOR, TERM and COLUMNS, and the two variables that it does not.

    Colours that are forced are a report's: a bar moves the cursor, too.
    """
    from rich.console import Console

    forced = os.environ.get("CLICOLOR_FORCE", "") not in ("", "0")
    refused = bool(os.environ.get("NO_COLOR")) or (os.environ.get("CLICOLOR") == "0" and not forced)
    return Console(
        file=cast("IO[str]", file),
        highlight=False,
        markup=False,
        emoji=False,
        force_terminal=True if forced and not bar else None,
        no_color=True if refused else None,
    )
