"""Where commands print: reports and JSON to stdout, progress and messages to stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import ProgressColumn

    from loratools.report.values import Symbols

OnProgress = Callable[[str, int, int], None]
Renderer = Callable[[int, "Symbols"], "RenderableType"]

# Widths in cells: with an amount and a rate of bytes, all of a bar fits into 80.
_ROOM = 40
_LEAST_BESIDE_BYTES = 16
_BAR_BESIDE_BYTES = 18
_BAR_AND_BYTES = 64  # all that stands before the name


def write_json(value: Any, *, written: str | None = None) -> None:
    """One JSON document on stdout.

    Args:
        value: What ``report.data`` makes of a result.
        written: The output that is in its place already, if there is one.
    """
    from loratools.report import data

    text = data.dumps(value)
    with _reporting(written):
        click.echo(text)


def write_report(render: Renderer, *, written: str | None = None) -> None:
    """A report on stdout.

    Args:
        render: Makes the report for a width in cells and the symbols that the output can show.
        written: The output that is in its place already, if there is one.
    """
    from loratools.report.values import symbols_for

    console = _console()
    report = render(console.width, symbols_for(console.encoding))
    with _reporting(written):
        # Written by click, since rich ends the program with status 1 where nobody reads any more.
        with console.capture() as captured:
            console.print(report)
        click.echo(captured.get(), nl=False, color=True)  # rich has decided on colours


@contextlib.contextmanager
def _reporting(written: str | None) -> Iterator[None]:
    """Print to stdout; once an output is written, a report that cannot be shown is no failure.

    Raises:
        OSError: Stdout takes no more (a full disk), and the report was all that there is.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read has seen enough
        _discard_stdout()
    except OSError as error:
        _discard_stdout()
        if written is None:
            raise
        reason = error.strerror or error
        click.echo(f"Warning: {written} was written; the report could not be: {reason}.", err=True)


def _discard_stdout() -> None:
    """Send what is left in stdout's buffer nowhere, lest Python fail to write it once more at exit."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def write_error(message: str) -> None:
    """What went wrong with one of several files, on stderr."""
    click.echo(f"Error: {message}", err=True)


@contextlib.contextmanager
def progress(doing: str, *, quiet: bool = False, in_bytes: bool = False) -> Iterator[OnProgress | None]:
    """A progress bar on stderr while the block runs; None where stderr is no terminal.

    Args:
        doing: What is being done, as a word or two.
        quiet: Whether the user wants none.
        in_bytes: Whether what is counted are bytes: the bar then shows their rate, too.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.text import Text

    from loratools.report.values import clean

    counted = (TextColumn(doing), *_columns(in_bytes), TextColumn("{task.fields[current]}", markup=False))
    console = _console(stderr=True)
    room = max(_LEAST_BESIDE_BYTES, console.width - _BAR_AND_BYTES) if in_bytes else _ROOM
    # Until it is known how much there is to do, an amount and a rate would be question marks.
    planning = (TextColumn(f"{doing}: looking at the files"), BarColumn(_BAR_BESIDE_BYTES))
    with Progress(*planning, console=console, transient=True) as shown:
        task = shown.add_task(doing, total=None, current="")

        def update(name: str, done: int, total: int) -> None:
            shown.columns = counted
            current = Text(clean(name))
            if in_bytes and current.cell_len > room:
                # Names in a checkpoint begin alike: what tells them apart is their end.
                current = Text("…" + current.plain[1 - room :])
            current.truncate(room, overflow="ellipsis")
            shown.update(task, completed=done, total=total, current=current.plain)

        yield update


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


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)
