"""Where commands print: reports and JSON to stdout, progress and messages to stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from loratools.report.values import Symbols

OnProgress = Callable[[str, int, int], None]
Renderer = Callable[[int, "Symbols"], "RenderableType"]


def write_json(value: Any) -> None:
    """One JSON document on stdout."""
    from loratools.report import data

    click.echo(data.dumps(value))


def write_report(render: Renderer) -> None:
    """A report on stdout.

    Args:
        render: Makes the report for a width in cells and the symbols that the output can show.
    """
    from loratools.report.values import symbols_for

    console = _console()
    console.print(render(console.width, symbols_for(console.encoding)))


def write_error(message: str) -> None:
    """What went wrong with one of several files, on stderr."""
    click.echo(f"Error: {message}", err=True)


@contextlib.contextmanager
def progress(doing: str, *, quiet: bool = False) -> Iterator[OnProgress | None]:
    """A progress bar on stderr while the block runs; None where stderr is no terminal.

    Args:
        doing: What is being done, as a word or two.
        quiet: Whether the user wants none.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    from loratools.report.values import clean

    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[current]}", markup=False),
    )
    with Progress(*columns, console=_console(stderr=True), transient=True) as shown:
        task = shown.add_task(doing, total=None, current="")

        def update(name: str, done: int, total: int) -> None:
            current = Text(clean(name))
            current.truncate(40, overflow="ellipsis")
            shown.update(task, completed=done, total=total, current=current.plain)

        yield update


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)
