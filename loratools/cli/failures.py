"""Exceptions as a user reads them, and the exit status that goes with them."""

from __future__ import annotations

import io
import os
import traceback
from types import TracebackType

import click

from loratools.cli import _interrupts, output
from loratools.errors import LoraError, visible

_DEBUG = "loratools.debug"


class Failure(click.ClickException):
    """Refused or failed: the message on stderr, exit status 1."""

    exit_code = 1


def interrupted(left: str = "") -> click.exceptions.Exit:
    """Say on stderr, in a word, that a signal has ended the run.

    Args:
        left: What can be done with what is left of it, in a sentence.

    Returns:
        What ends it: with 128 and the signal's number, as shells have it of a process that one has ended.
    """
    word = _interrupts.word()
    output.tell(f"{word}. {left}" if left else word)
    return click.exceptions.Exit(_interrupts.status())


def remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Callback of --debug."""
    ctx.meta[_DEBUG] = value


def debugging(ctx: click.Context) -> bool:
    """Whether --debug was given to the command that runs."""
    return bool(ctx.meta.get(_DEBUG))


def told(error: click.ClickException) -> int:
    """Say on stderr what an exception says; click repeats arguments in its own, which may hold anything.

    Returns:
        The exit status.
    """
    shown = io.StringIO()
    error.show(file=shown)
    text = shown.getvalue()
    if error.message:
        text = text.replace(error.message, visible(error.message))
    output.tell(_visible_lines(text), end="")
    return error.exit_code


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What --debug shows, on stderr: Python's traceback, in which messages cannot steer the terminal."""
    output.tell(_visible_lines("".join(traceback.format_exception(kind, error, trace))), end="")


def message(error: BaseException) -> str:
    """What went wrong, in a sentence that says what to do."""
    if isinstance(error, LoraError):
        return str(error)
    # torch's own out-of-memory errors are told by name (a device's) and words, so that torch need not be imported.
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if full or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return "There is not enough memory. Try fewer files at once, or --device cpu."
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return visible(f"{where}{error.strerror or error}.")
    return visible(
        f"{type(error).__name__}: {error}. This is a fault in loratools, not in how it was used. "
        "Please report it with what --debug shows."
    )


def _visible_lines(text: str) -> str:
    return "\n".join(map(visible, text.split("\n")))
