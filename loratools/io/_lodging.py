"""Where an output lies until it has its name: in ``.NAME.work`` beside it, under a lock that tells who is at work.

What a killed run has left there is found by the output's name, and is known to be dead once its lock can be taken.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loratools.errors import OutputExistsError, WriteError
from loratools.io._lock import HeldError, Lock

LOCK = "lock"
"""The name of the lock in a work folder."""
_PART = ".part"  # how the names of half-made outputs end
_LONGEST_NAME = 200  # bytes of the output's name in that of the folder: 255 have to do for all of it
_SHOWN_NAME = 40  # characters of it in the name of what is half-made: likewise
_lodged: dict[Path, Path] = {}  # by output, the work folder of a run that makes it


def folder_of(target: Path) -> Path:
    """The work folder of an output, whose path has no links."""
    name = os.fsencode(target.name)
    if len(name) > _LONGEST_NAME:
        start = name[: _LONGEST_NAME - 17].decode("utf-8", "ignore")
        return target.with_name(f".{start}-{hashlib.sha256(name).hexdigest()[:16]}.work")
    return target.with_name(f".{target.name}.work")


def lodge(target: Path, folder: Path) -> None:
    """Have what is half-made of an output lie in its run's work folder, which the run has locked."""
    _lodged[target] = folder


def dislodge(target: Path) -> None:
    """The work folder is no longer there for it."""
    _lodged.pop(target, None)


def entered(folder: Path) -> Lock:
    """Make a work folder, unless it is there, and lock it.

    Raises:
        HeldError: Another process has it.
        WriteError: A link is in its place, which may lead anywhere.
        OSError: The system refuses.
    """
    if folder.is_symlink():
        raise WriteError(
            "a symbolic link is in the place of the work folder",
            path=folder,
            expected="A run keeps there what it has done so far",
            todo="Remove the link",
        )
    while True:
        folder.mkdir(exist_ok=True)
        try:
            return Lock(folder / LOCK)
        except FileNotFoundError:  # whoever was at work in it has removed it meanwhile
            continue


@contextmanager
def half_made(target: Path) -> Iterator[Path]:
    """A name for what is half-made of an output: nothing is there yet, and whatever is there at the end goes.

    What killed runs have half made of the same output goes first; what can be resumed stays.

    Args:
        target: The output, by a path without links.

    Raises:
        OutputExistsError: Another process is writing this output.
        OSError: The system refuses.
    """
    name = f".{target.name[:_SHOWN_NAME]}.{os.urandom(6).hex()}{_PART}"
    lodging = _lodged.get(target)
    if lodging is not None:
        with _removed(lodging / name):
            yield lodging / name
        return
    folder = folder_of(target)
    try:
        lock = entered(folder)
    except HeldError as error:
        raise held(os.fspath(target)) from error
    try:
        for left in folder.glob(f".*{_PART}"):
            _remove(left)
        with _removed(folder / name):
            yield folder / name
    finally:
        lock.release()
        with suppress(OSError):  # not empty where a run can be resumed, or another process is at work in it
            folder.rmdir()


def held(output: str) -> OutputExistsError:
    """The error for an output that another process is writing."""
    return OutputExistsError(
        "another process is writing this output",
        path=output,
        todo="Wait until it is done, or choose another name",
    )


@contextmanager
def _removed(part: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):  # gone under its new name; a read-only file system refuses even that
            _remove(part)


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part)
    else:
        part.unlink()
