"""Outputs that are whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loratools.errors import LoraError, OutputExistsError, WriteError
from loratools.io import unchanged
from loratools.io._lodging import half_made


@contextmanager
def atomic_output(path: str | os.PathLike[str], overwrite: bool, needed: int | None = None) -> Iterator[Path]:
    """A temporary file beside ``path``, empty, to be filled; it takes the name ``path`` at the end.

    On any failure, an interrupt included, the temporary file is removed and an old ``path`` is untouched. A
    killed process leaves the old file too, and a hidden folder with the temporary one, which the next that writes
    the same output removes. A symbolic link is written through.
    The output may be a file that is being read: on POSIX a map keeps the old content; Windows refuses while
    the file is open.

    Args:
        path: The output.
        overwrite: Whether an existing file may be replaced.
        needed: The output's size in bytes where it is known, for the message when the disk is full.

    Raises:
        OutputExistsError: The output is there, and ``overwrite`` is false; or another process is writing it.
        WriteError: The output is a folder or a device, its folder is missing, or the system refuses.
    """
    target = Path(os.path.realpath(path))
    check_file(target, overwrite)
    with _write_errors(target, needed), half_made(target) as temporary:
        # Made here rather than by tempfile, whose files no one else may read whatever the umask says.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        sync(temporary)
        check_file(target, overwrite)
        unchanged.check()
        unchanged.rename(temporary, target)
    sync_folder(target.parent)


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], overwrite: bool, replaced: Collection[str] = ()
) -> Iterator[Path]:
    """A temporary folder beside ``path``, to be filled; it takes the name ``path`` at the end.

    Where ``path`` is a folder with files in it and ``overwrite`` is true, the new files replace those of the
    same name one by one, configurations last, so that no configuration describes weights that are not there
    yet; other files stay, but for those that the new ones replace under another name.

    Args:
        path: The output.
        overwrite: Whether files of an existing folder may be replaced.
        replaced: Names of files that go once the new ones are in place, unless they are among them.

    Raises:
        OutputExistsError: The folder holds files, and ``overwrite`` is false; or another process is writing it.
        WriteError: The output is a file, its parent is missing, or the system refuses.
    """
    target = Path(os.path.realpath(path))
    check_folder(target, overwrite)
    with _write_errors(target, None), half_made(target) as temporary:
        temporary.mkdir()
        with _named_as(temporary, target):
            yield temporary
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        for file in files:
            sync(file)
        check_folder(target, overwrite)
        unchanged.check()
        with suppress(OSError):  # only an empty folder can be removed, and need not be kept
            target.rmdir()
        if target.exists():
            replace_files(files, temporary, target)
            for name in replaced:
                if temporary / name not in files:
                    (target / name).unlink(missing_ok=True)
        else:
            unchanged.rename(temporary, target)
    sync_folder(target.parent)


def replace_files(files: list[Path], source: Path, target: Path) -> None:
    """Move files to their places in a folder, the index (JSON) files last, so that none names what is not there yet."""
    for file in sorted(files, key=lambda file: (file.suffix == ".json", file)):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        unchanged.rename(file, place)
    sync_folder(target)


@contextmanager
def _named_as(temporary: Path, target: Path) -> Iterator[None]:
    """Have the errors of single files name the folder that they are for, rather than the one that they are made in."""
    try:
        yield
    except WriteError as error:
        problem, path = (
            text.replace(os.fspath(temporary), os.fspath(target))
            for text in (error.problem, error.path or "")
        )
        raise WriteError(problem, path=path, expected=error.expected, todo=error.todo) from error


def check_file(target: Path, overwrite: bool) -> None:
    """Refuse a file that cannot be written, or one that exists unless it may be overwritten."""
    mode = _mode(target)
    if mode is None:
        _check_parent(target)
    elif stat.S_ISDIR(mode):
        raise WriteError("the output is a folder", path=target, expected="A file's name was expected")
    elif not stat.S_ISREG(mode):
        raise WriteError(
            "the output is a device or a pipe", path=target, expected="A file's name was expected"
        )
    elif not overwrite:
        raise OutputExistsError(
            "the output exists already",
            path=target,
            todo="Pass --overwrite to replace it, or choose another name",
        )


def check_folder(target: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be written, or one that exists unless it may be overwritten."""
    mode = _mode(target)
    if mode is None:
        _check_parent(target)
    elif not stat.S_ISDIR(mode):
        raise WriteError("the output is a file", path=target, expected="A folder's name was expected")
    elif not overwrite and any(target.iterdir()):
        raise OutputExistsError(
            "the output folder exists already and holds files",
            path=target,
            todo="Pass --overwrite to replace its files, or choose another name",
        )


def _mode(target: Path) -> int | None:
    """The file's mode, or None where there is no such file (or none that can be seen)."""
    try:
        return target.stat().st_mode
    except OSError:
        return None


def _check_parent(target: Path) -> None:
    if not target.parent.is_dir():
        raise WriteError(
            f"the folder {target.parent} does not exist",
            path=target,
            todo="Create it, or choose another name",
        )


@contextmanager
def _write_errors(target: Path, needed: int | None) -> Iterator[None]:
    """Turn what the system raises into an error that says how much room there was."""
    try:
        yield
    except LoraError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        import shutil

        with suppress(OSError):
            room = f"{shutil.disk_usage(target.parent).free:,} bytes are free in {target.parent}"
            reason += f" ({needed:,} bytes needed, {room})" if needed is not None else f" ({room})"
        raise WriteError(
            f"cannot be written: {reason}",
            path=target,
            expected="Nothing was left behind, and an old file is untouched",
            todo="Make room, check the permissions, close the file elsewhere, or choose another folder",
        ) from error


def sync(file: Path) -> None:
    """Have the content on the disk before its name, lest a power cut leave the name of an empty file."""
    with open(file, "r+b") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Have a rename on the disk; where folders cannot be opened (Windows) it follows later."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
