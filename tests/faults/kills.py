"""Runs that are killed: at moments of a clock, at calls of the system, and as users start them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.faults.hooks import Trigger
from tests.faults.stage import Ended, Operation, Stage

_PUBLISHING = 8  # calls at the end of a run, by which an output takes its name
_START = 1.5  # s that the interpreter takes to import what an operation needs, about


def at_moments(stage: Stage, operation: Operation, count: int, draw: Random) -> Iterator[list[str]]:
    """Killed at a moment of its run, uniformly; half of them bring the journal to the disk after every task."""
    for number in range(count):
        folder = stage.fresh()
        moment = draw.uniform(0, 1.05) * stage.seconds[operation.name]
        more = _resumable(stage, operation, draw)
        done = stage.run(operation, folder, *more, kill_after=moment, every=_every(draw))
        yield _afterwards(stage, operation, folder, done, clean=bool(number % 2))


def at_calls(stage: Stage, operation: Operation, count: int, draw: Random) -> Iterator[list[str]]:
    """Killed right before or after one of its writes, renames, …: half of them one of the last, which publish."""
    calls = stage.calls[operation.name]
    for number in range(count):
        folder = stage.fresh()
        call = draw.randrange(max(0, calls - _PUBLISHING) if draw.random() < 0.5 else 0, calls)
        trigger = Trigger(call, "kill", before=draw.random() < 0.5)
        more = _resumable(stage, operation, draw)
        done = stage.run(operation, folder, *more, trigger=trigger, every=_every(draw))
        yield _afterwards(stage, operation, folder, done, clean=bool(number % 2))


def whole_processes(stage: Stage, operation: Operation, count: int, draw: Random) -> Iterator[list[str]]:
    """Started by the interpreter, as users do, and killed."""
    for number in range(count):
        folder = stage.fresh()
        moment = draw.uniform(_START, _START + stage.seconds[operation.name])
        done = stage.whole(operation, folder, moment)
        yield _afterwards(stage, operation, folder, done, clean=bool(number % 2))


def _every(draw: Random) -> float | None:
    return 0.0 if draw.random() < 0.5 else None


def _resumable(stage: Stage, operation: Operation, draw: Random) -> tuple[str, ...]:
    """Half of the runs are told beforehand that they will be resumed."""
    return ("--resume",) if draw.random() < 0.5 and stage.has(operation, "--resume") else ()


def _afterwards(stage: Stage, operation: Operation, folder: Path, done: Ended, *, clean: bool) -> list[str]:
    """What does not hold after a kill; some runs are cleaned up, all others are gone on with."""
    broken = list(stage.broken(operation, folder))
    if done.code not in (0, -signal.SIGKILL):  # it may have been quicker
        broken.append(f"not ended by the kill ({done.code}): {done.said}")
    if clean and stage.has(operation, "--clean"):
        broken += _cleaned(stage, operation, folder)
    else:
        broken += _resumed(stage, operation, folder)
    stage.done(folder)
    return broken


def _cleaned(stage: Stage, operation: Operation, folder: Path) -> Iterator[str]:
    there = (folder / operation.output).exists()
    ended = stage.run(operation, folder, "--clean")
    if ended.code != 0:
        yield f"--clean fails ({ended.code}): {ended.said}"
    if stage.left(operation, folder):
        yield f"--clean leaves {stage.left(operation, folder)}"
    if (folder / operation.output).exists() != there:
        yield "--clean does not leave the output as it was"


def _resumed(stage: Stage, operation: Operation, folder: Path) -> Iterator[str]:
    more = ["--resume"] if stage.has(operation, "--resume") else []
    if (folder / operation.output).exists():
        more.append("--overwrite")
    ended = stage.run(operation, folder, *more)
    if ended.code != 0:
        yield f"the next run fails ({ended.code}): {ended.said}"
    elif not stage.is_whole(operation, folder):
        yield "the next run writes other bytes"
    if stage.left(operation, folder):
        yield f"the next run leaves {stage.left(operation, folder)}"
