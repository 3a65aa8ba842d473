"""Faults inside a run: something that happens at a call of the system, and reads that fail or give less."""

from __future__ import annotations

import builtins
import errno
import itertools
import os
import random
import shutil
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

from loratools.io import mapped

# By which files come into being, take their names and go.
CALLS = (
    "fsync",
    "ftruncate",
    "mkdir",
    "posix_fallocate",
    "pwrite",
    "remove",
    "rename",
    "replace",
    "rmdir",
    "unlink",
)


class Trigger(NamedTuple):
    """Something that happens at one of a run's calls of the system.

    Attributes:
        number: Of the call, counted from 0; or of the calls of this name alone.
        action: "kill", "remove" (a folder), "move" (a folder), or how a file changes: "grow", "shorten", "rewrite",
            "replace".
        before: Whether before the call or after it.
        path: Of the folder or file.
        name: Of the calls that count; empty for all.
        output: Where it is there when a folder is removed, an empty file ``PATH.had`` is left to say so.
    """

    number: int
    action: str
    before: bool = True
    path: str = ""
    name: str = ""
    output: str = ""


class Reads(NamedTuple):
    """What becomes of reads.

    Attributes:
        kind: "fail" for an input/output error, "short" for fewer bytes than asked for.
        share: Of the reads that are hit, a fraction.
        seed: Of their choice.
        folder: Only files in it are hit where a file is opened by its name.
    """

    kind: str
    share: float
    seed: int
    folder: str


def on_calls(trigger: Trigger | None) -> Callable[[], int]:
    """Count calls, and act at one of them; returns what tells the count so far."""
    numbers, last = itertools.count(), [0]

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            counts = trigger is None or trigger.name in ("", name)
            number = next(numbers) if counts else -1
            last[0] = max(last[0], number + 1)
            due = trigger is not None and number == trigger.number
            if due and trigger.before:
                act(trigger)
            result = real(*given, **named)
            if due and not trigger.before:
                act(trigger)
            return result

        return call

    for name in CALLS:
        if hasattr(os, name):
            setattr(os, name, wrap(name, getattr(os, name)))
    return lambda: last[0]


def act(trigger: Trigger) -> None:
    """Let it happen."""
    if trigger.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif trigger.action == "remove":
        if trigger.output and os.path.exists(trigger.output):
            open(f"{trigger.path}.had", "wb").close()
        shutil.rmtree(trigger.path, ignore_errors=True)
    elif trigger.action == "move":
        os.replace(trigger.path, f"{trigger.path}.moved")
    else:
        change(trigger.path, trigger.action)


def change(path: str, how: str) -> None:
    """Change a file as another program would: "grow", "shorten", "rewrite" or "replace"."""
    size = os.path.getsize(path)
    if how == "shorten":
        os.truncate(path, size // 2)
    elif how == "grow":
        with open(path, "ab") as file:
            file.write(bytes(4096))
    elif how == "rewrite":
        with open(path, "r+b") as file:
            file.seek(size * 3 // 4)
            file.write(bytes(min(4096, size // 8)))
    else:
        shutil.copyfile(path, f"{path}.new")
        change(f"{path}.new", "rewrite")
        os.replace(f"{path}.new", path)


def on_reads(reads: Reads) -> None:
    """Have reads fail, or give less than was asked for, wherever a file is read but by a map."""
    chosen = random.Random(reads.seed)

    def hit() -> bool:
        return chosen.random() < reads.share

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(*given: Any) -> Any:
            if hit():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*given)

        return read

    short = {
        "preadv": _short_vector,
        "pread": _short_second,
        "copy_file_range": _short_third,
        "sendfile": _short_last,
    }
    for name, less in short.items():
        real = getattr(os, name, None)
        if real is not None:
            setattr(os, name, failing(real) if reads.kind == "fail" else _maybe(hit, less, real))
    if mapped._PREAD is not None:
        mapped._PREAD = os.pread
    if reads.kind == "fail":
        _open(reads.folder, hit)


def _maybe(hit: Callable[[], bool], less: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    def read(*given: Any) -> Any:
        return real(*(less(*given) if hit() else given))

    return read


def _short_vector(file: int, buffers: list[memoryview], start: int) -> tuple[Any, ...]:
    return file, [buffers[0][: max(1, len(buffers[0]) // 2)]], start


def _short_second(file: int, count: int, start: int) -> tuple[int, ...]:
    return file, max(1, count // 2), start


def _short_third(source: int, target: int, count: int, *rest: int) -> tuple[int, ...]:
    return source, target, max(1, count // 2), *rest


def _short_last(target: int, source: int, start: int, count: int) -> tuple[int, ...]:
    return target, source, start, max(1, count // 2)


def _open(folder: str, hit: Callable[[], bool]) -> None:
    real = builtins.open

    def opened(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        inside = isinstance(file, str | os.PathLike) and os.path.abspath(file).startswith(folder)
        if inside and "r" in mode and "+" not in mode and hit():
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(file))
        return real(file, mode, *given, **named)

    builtins.open = opened
