"""Inputs that cannot be read, are read in pieces, or change while they are read."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.faults import hooks
from tests.faults.hooks import Reads, Trigger
from tests.faults.stage import Ended, Operation, Stage, ended, written

_HOW = ("rewrite", "replace", "grow", "shorten")


def errors(stage: Stage, operation: Operation, count: int, draw: Random) -> Iterator[list[str]]:
    """Some reads end with an input/output error: the run is refused, or none of those was needed."""
    return _reads(stage, operation, count, draw, "fail")


def short_reads(stage: Stage, operation: Operation, count: int, draw: Random) -> Iterator[list[str]]:
    """Some reads, or all, give half of what was asked for: the rest is read by another call."""
    return _reads(stage, operation, count, draw, "short")


def _reads(stage: Stage, operation: Operation, count: int, draw: Random, kind: str) -> Iterator[list[str]]:
    for number in range(count):
        folder = stage.fresh()
        share = (1.0, 0.2, 0.02)[number % 3]
        reads = Reads(kind, share, draw.randrange(1 << 30), str(stage.root / "in"))
        done = stage.run(operation, folder, reads=reads)
        broken = list(stage.broken(operation, folder))
        if done.code != 0 and (kind == "short" or not done.refused):
            broken.append(f"not refused in order ({done.code}): {done.said}")
        if stage.left(operation, folder):
            broken.append(f"left behind: {stage.left(operation, folder)}")
        stage.done(folder)
        yield broken


def changed_at_the_end(stage: Stage, operation: Operation, count: int, _: Random) -> Iterator[list[str]]:
    """An input changes when all of it was read and the output is about to be brought to the disk: refused."""
    for number in range(count):
        folder = stage.apart()
        source = stage.input(operation, folder)
        how = _HOW[number % len(_HOW)]
        done = stage.run(operation, folder, trigger=Trigger(0, how, path=str(source), name="fsync"))
        broken = [] if done.refused else [f"{how}: not refused ({done.code}): {done.said}"]
        if done.refused and "has changed" not in done.said and "bytes now, and had" not in done.said:
            broken.append(f"{how}: refused for another reason: {done.said}")
        yield broken + list(_nothing(operation, folder, how))
        stage.done(folder.parent.parent)


def changed_meanwhile(stage: Stage, operation: Operation, count: int, draw: Random) -> Iterator[list[str]]:
    """An input changes at some moment: refused, or the output is that of the old input or of the new one as a whole."""
    new = {how: _of_changed(stage, operation, how) for how in _HOW[:count]}
    for number in range(count):
        folder = stage.apart()
        how = _HOW[number % len(_HOW)]
        started = time.monotonic()
        process, log = stage.start(operation, folder)
        process.join(draw.uniform(0, 1) * stage.seconds[operation.name])
        hooks.change(str(stage.input(operation, folder)), how)
        done = ended(process, log, started)
        yield list(_judged(stage, operation, folder, how, done, new[how]))
        stage.done(folder.parent.parent)


def _of_changed(stage: Stage, operation: Operation, how: str) -> dict[str, str]:
    """What is written of an input that was changed before."""
    folder = stage.apart()
    hooks.change(str(stage.input(operation, folder)), how)
    stage.run(operation, folder)
    found = written(folder / operation.output)
    stage.done(folder.parent.parent)
    return found


def _judged(
    stage: Stage, operation: Operation, folder: Path, how: str, done: Ended, new: dict[str, str]
) -> Iterator[str]:
    if done.code == 0:
        if written(folder / operation.output) not in (stage.references[operation.name], new):
            yield f"{how}: the output is of neither input"
        return
    if operation.mapped and how == "shorten" and done.code == -signal.SIGBUS:
        if (folder / operation.output).exists():
            yield f"{how}: an output is there though the process was ended"
        return
    if not done.refused:
        yield f"{how}: not refused in order ({done.code}): {done.said}"
    yield from _nothing(operation, folder, how)


def _nothing(operation: Operation, folder: Path, how: str) -> Iterator[str]:
    found = sorted(each.name for each in folder.iterdir())
    if found:
        yield f"{how}: an output, or more, is there: {found}"
