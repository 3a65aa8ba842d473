"""Exceptions as a user reads them, and the exit status that goes with them."""

from __future__ import annotations

import os
from typing import IO, Any

import click

from loratools.errors import LoraError

_DEBUG = "loratools.debug"


class Failure(click.ClickException):
    """Refused or failed: the message on stderr, exit status 1."""

    exit_code = 1


class Interrupted(click.ClickException):
    """Ctrl-C: exit status 130, which is what shells give a process that SIGINT has ended."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("Interrupted")

    def show(self, file: IO[Any] | None = None) -> None:
        """One word on stderr."""
        click.echo("Interrupted", file=file, err=file is None)


def remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Callback of --debug."""
    ctx.meta[_DEBUG] = value


def debugging(ctx: click.Context) -> bool:
    """Whether --debug was given to the command that runs."""
    return bool(ctx.meta.get(_DEBUG))


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
        return f"{where}{error.strerror or error}."
    return (
        f"{type(error).__name__}: {error}. This is a fault in loratools, not in how it was used. "
        "Please report it with what --debug shows."
    )
