"""Folders that cannot be written to, or go while an output is written; and two runs that write one output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random

from tests.faults.full_disks import CannotError
from tests.faults.hooks import Trigger
from tests.faults.stage import Operation, Stage, ended, written

_WITHIN = "sub"


def read_only(stage: Stage, operation: Operation, count: int, _: Random) -> Iterator[list[str]]:
    """The folder of the output may not be written to."""
    if os.name != "posix":
        raise CannotError("folders have no modes")
    for _number in range(count):
        folder = stage.fresh()
        folder.chmod(0o555)
        done = stage.run(operation, folder, unprivileged=True)
        broken = [] if done.refused else [f"not refused in order ({done.code}): {done.said}"]
        if list(folder.iterdir()):
            broken.append(f"left behind: {os.listdir(folder)}")
        folder.chmod(0o755)
        stage.done(folder)
        yield broken


def vanishing(stage: Stage, operation: Operation, count: int, draw: Random) -> Iterator[list[str]]:
    """The folder of the output is removed, or renamed, at one of the run's calls of the system."""
    if os.name != "posix":
        raise CannotError("folders with open files cannot be removed")
    inside = operation._replace(output=f"{_WITHIN}/{operation.output}")
    for number in range(count):
        folder = stage.fresh()
        (folder / _WITHIN).mkdir()
        action = "move" if number % 2 else "remove"
        call = draw.randrange(stage.calls[operation.name])
        output = str(folder / inside.output)
        done = stage.run(
            inside, folder, trigger=Trigger(call, action, path=str(folder / _WITHIN), output=output)
        )
        goals = [folder / _WITHIN, folder / f"{_WITHIN}.moved"]
        found = [written(goal / operation.output) for goal in goals if (goal / operation.output).exists()]
        broken = list(stage.broken(inside, folder))
        if any(each != stage.references[operation.name] for each in found):
            broken.append(f"{action} at call {call}: an output is not whole")
        # What is removed once it has its name was there, and whole.
        if not found and not done.refused and not (folder / f"{_WITHIN}.had").exists():
            broken.append(f"{action} at call {call}: not refused in order ({done.code}): {done.said}")
        stage.done(folder)
        yield broken


def missing(stage: Stage, operation: Operation, count: int, _: Random) -> Iterator[list[str]]:
    """The folder of the output is not there."""
    inside = operation._replace(output=f"{_WITHIN}/{operation.output}")
    for _number in range(count):
        folder = stage.fresh()
        done = stage.run(inside, folder)
        broken = [] if done.refused else [f"not refused in order ({done.code}): {done.said}"]
        if list(folder.iterdir()):
            broken.append(f"left behind: {os.listdir(folder)}")
        stage.done(folder)
        yield broken


def two_at_once(stage: Stage, operation: Operation, count: int, draw: Random) -> Iterator[list[str]]:
    """Two runs with other options write one output: it is one's or the other's, and nothing is left of either."""
    folder = stage.fresh()
    stage.run(operation, folder, *operation.other)
    results = [stage.references[operation.name], written(folder / operation.output)]
    stage.done(folder)
    for number in range(count):
        folder = stage.fresh()
        more = ("--overwrite",) if number % 2 else ()
        first = stage.start(operation, folder, *more)
        first[0].join(draw.uniform(0, 1) * stage.seconds[operation.name])
        second = stage.start(operation, folder, *operation.other, *more)
        both = [ended(process, log, 0.0) for process, log in (first, second)]
        broken = [
            f"not refused in order ({done.code}): {done.said}"
            for done in both
            if done.code != 0 and not done.refused
        ]
        if all(done.code for done in both):
            broken.append(f"neither wrote it: {[done.said for done in both]}")
        if written(folder / operation.output) not in results:
            broken.append("the output is of neither")
        if stage.left(operation, folder):
            broken.append(f"left behind: {stage.left(operation, folder)}")
        stage.done(folder)
        yield broken
