"""Disks that are full: a small file system in memory where one may be mounted, and a limit to the size of files."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from tests.faults.stage import Ended, Operation, Stage, written

_LEVELS = (0.02, 0.3, 0.6, 0.9, 0.99)  # of what an output takes
_ROOM = 64 << 20  # bytes: enough for what any of these operations writes
_PAGE = 4096


class CannotError(Exception):
    """This platform cannot do what a scenario is about."""


def small_file_system(stage: Stage, operation: Operation, count: int, draw: Random) -> Iterator[list[str]]:
    """The output's file system is full at some part of what is written; then it is made larger."""
    for number in range(count):
        folder = stage.fresh()
        size = int(_level(number, draw) * stage.bytes[operation.name])
        least = 4 + 2 * len(stage.references[operation.name])  # pages: what an older output takes
        with _mounted(folder, max(size // _PAGE, least) * _PAGE):
            old = _old(stage, operation, folder) if number % 2 else {}
            more = ["--overwrite"] if old else []
            if number % 4 < 2 and stage.has(operation, "--resume"):
                more.append("--resume")
            ended = stage.run(operation, folder, *more, every=0.0)
            broken = list(_refused(stage, operation, folder, ended, old, kept="--resume" in more))
            if ended.code != 0:
                _mount("remount", folder, _ROOM)
                again = stage.run(operation, folder, *more)
                if again.code != 0 or not stage.is_whole(operation, folder) or stage.left(operation, folder):
                    broken.append(f"with room again it does not go on ({again.code}): {again.said}")
        stage.done(folder)
        yield broken


def limited_files(stage: Stage, operation: Operation, count: int, draw: Random) -> Iterator[list[str]]:
    """No file may grow beyond a part of the largest that is written (RLIMIT_FSIZE)."""
    if not _has_limits():
        raise CannotError("the system has no limits of files' sizes")
    for number in range(count):
        folder = stage.fresh()
        old = _old(stage, operation, folder) if number % 2 else {}
        more = ["--overwrite"] if old else []
        limit = int(_level(number, draw) * stage.largest[operation.name])
        ended = stage.run(operation, folder, *more, file_size=limit)
        yield list(_refused(stage, operation, folder, ended, old))
        stage.done(folder)


def _level(number: int, draw: Random) -> float:
    return _LEVELS[number] if number < len(_LEVELS) else draw.uniform(0, 1.2)


def _old(stage: Stage, operation: Operation, folder: Path) -> dict[str, str]:
    """Put an older output in the place; returns its digests."""
    output = folder / operation.output
    for name in stage.references[operation.name]:
        path = output / name if name else output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"old")
    return written(output)


def _refused(
    stage: Stage, operation: Operation, folder: Path, ended: Ended, old: dict[str, str], *, kept: bool = False
) -> Iterator[str]:
    """What does not hold of a run that had not enough room, or just had."""
    if ended.code == 0:
        yield from stage.broken(operation, folder)
    elif not ended.refused or "cannot be written" not in ended.said:
        yield f"not refused in order ({ended.code}): {ended.said}"
    elif written(folder / operation.output) != old:
        yield "the old output is not what it was"
    left = stage.left(operation, folder)
    if left and not (kept and ended.code and all(name.endswith(".work") for name in left)):
        yield f"left behind: {left}"


@contextmanager
def _mounted(folder: Path, size: int) -> Iterator[None]:
    _mount("rw", folder, size)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def _mount(how: str, folder: Path, size: int) -> None:
    """Mount a file system in memory, or give it another size.

    Raises:
        CannotError: The system does not allow it.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"{how},size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CannotError("there is no `mount`") from error
    if done.returncode:
        raise CannotError(f"no file system in memory can be mounted ({done.stderr.strip()})")


def _has_limits() -> bool:
    try:
        import resource
    except ImportError:
        return False
    return hasattr(resource, "RLIMIT_FSIZE")
