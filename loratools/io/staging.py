"""Outputs at URLs: made on this machine, and uploaded when they are whole.

An output at a URL has a folder of its own in the temporary folder (``TMPDIR``), whose name follows from the URL: the
output is made there as any other, work folder and journal beside it, and an interrupted run is resumed there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from loratools.errors import LoraError, OptionError, OutputExistsError, ReadError, WriteError
from loratools.io import storage
from loratools.io._lock import HeldError, Lock

_LOCK = ".lock"
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".npz", ".gguf", ".index.json")
_READ_ONLY = ("http://", "https://")

Raised = TypeVar("Raised", bound=LoraError)


def place(url: str) -> str:
    """The path on this machine where what goes to a URL is made; its folder may not be there yet."""
    whole = url.rstrip("/")
    owner = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    folder = hashlib.sha256(whole.encode()).hexdigest()[:16]
    return os.path.join(tempfile.gettempdir(), f"loratools{owner}", folder, whole.rpartition("/")[2])


@contextmanager
def staged(url: str, *, overwrite: bool) -> Iterator[str]:
    """A path to write the output to that goes to ``url``; it is uploaded at the end, if anything was written.

    A folder's weights go before its indices and configurations. What was made stays where it is if it cannot be
    uploaded, and the error says where.

    Args:
        url: Of a file or folder.
        overwrite: Whether an existing file may be replaced, and files of an existing folder.

    Raises:
        OptionError: Nothing can be written to such a URL.
        OutputExistsError: There is something, and ``overwrite`` is false; or another process writes to this URL.
        WriteError: It cannot be made here, or not be uploaded.
    """
    _check_kind(url)
    _check_free(url, overwrite=overwrite)
    local = Path(place(url))
    _own_folder(local.parent)
    try:
        lock = Lock(local.parent / _LOCK)
    except HeldError as error:
        raise OutputExistsError("another process is writing this output", path=url) from error
    try:
        _remove(local)  # what an earlier run could not upload: whoever writes it again has no use for it
        with _named(url, local):
            yield os.fspath(local)
        if local.exists():
            _upload(local, url)
            _remove(local)
    finally:
        lock.release()
        with suppress(OSError):  # an interrupted run has left there what it goes on with
            local.parent.rmdir()


def check_room(folder: str, needed: int, url: str) -> None:
    """Refuse what does not fit on the disk of the temporary folder.

    Args:
        folder: Where it would lie.
        needed: Bytes; -1 where that is not known.
        url: For the message.

    Raises:
        WriteError: It does not fit.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WriteError(
            f"{needed:,} bytes are needed in {folder}, and {free:,} are free",
            path=url,
            expected="Files that cannot be read in parts are fetched whole into the temporary folder",
            todo="Make room, or set TMPDIR to a folder that has it",
        )


def _check_kind(url: str) -> None:
    if url.startswith(storage.HUB):
        raise OptionError(
            "nothing is written to a hub",
            path=url,
            expected="A path, or the URL of a store of files (s3://, gs://, …), was expected",
            todo="Write it to a path, and then run: hf upload ORG/REPO PATH",
        )
    if url.startswith(_READ_ONLY):
        raise OptionError(
            "nothing is written to a web server",
            path=url,
            expected="A path, or the URL of a store of files (s3://, gs://, …), was expected",
            todo="Write it to a path, and upload it from there",
        )


def _check_free(url: str, *, overwrite: bool) -> None:
    from loratools.io import remote

    remote.afresh(url)
    if not overwrite and (storage.is_file(url) or (storage.is_dir(url) and storage.tree(url))):
        raise OutputExistsError(
            "the output exists already",
            path=url,
            todo="Pass --overwrite to replace it, or choose another name",
        )


def _own_folder(folder: Path) -> None:
    """Make a folder in the temporary folder that no other user can have put there, or can look into."""
    for each in (folder.parent, folder):
        try:
            each.mkdir(mode=0o700, exist_ok=True)
            status = each.lstat()
        except OSError as error:
            raise _unusable(each, error.strerror or str(error)) from error
        if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
            raise _unusable(each, "it is a link, a file, or another user's")


def _unusable(folder: Path, reason: str) -> WriteError:
    return WriteError(
        f"cannot be used: {reason}",
        path=folder,
        expected="Outputs at URLs are made there before they are uploaded",
        todo="Set TMPDIR to a folder of your own",
    )


def _upload(local: Path, url: str) -> None:
    """Have a file, or all files of a folder, at a URL; where that fails, none that was not there before."""
    from loratools.io import remote

    if local.is_file():
        goals = {url: local}
        before: set[str] = {url} if storage.is_file(url) else set()
    else:
        files = sorted(file for file in local.rglob("*") if file.is_file())
        files.sort(key=lambda file: (file.suffix == ".json", file.name.endswith(".index.json")))
        top = url.rstrip("/")
        goals = {f"{top}/{file.relative_to(local).as_posix()}": file for file in files}
        before = {f"{top}/{name}" for name in storage.tree(url)} if storage.is_dir(url) else set()
        _check_stale(url, local, [name for name in before if name not in goals and name.endswith(_WEIGHTS)])
    done: list[str] = []
    try:
        for goal, file in goals.items():
            remote.upload(os.fspath(file), goal)
            done.append(goal)
    except BaseException as error:
        for goal in done:
            if goal not in before:
                with suppress(LoraError):  # the store may be gone altogether
                    remote.remove(goal)
        if isinstance(error, LoraError):
            raise _kept(error, url, local, [goal for goal in done if goal in before]) from error
        raise


def _check_stale(url: str, local: Path, stale: list[str]) -> None:
    """Refuse a folder in which weights would stay that the new ones do not replace: readers would take either."""
    if stale:
        raise OutputExistsError(
            f"the folder holds {len(stale)} files of weights that would not be replaced",
            path=url,
            keys=sorted(stale),
            expected=f"A folder's files of weights are those of one model; the whole output is at {local}",
            todo="Remove them and upload it from there, or choose another folder",
        )


def _kept(error: LoraError, url: str, local: Path, replaced: list[str]) -> WriteError:
    said = f"; {len(replaced)} files were replaced before that" if replaced else ""
    return WriteError(
        f"cannot be uploaded: {error.problem}{said}",
        path=url,
        keys=replaced,
        expected=f"The whole output is at {local}",
        todo=error.todo or "Upload it from there, or try again",
    )


@contextmanager
def _named(url: str, local: Path) -> Iterator[None]:
    """Have errors name the URL rather than the path that the output is made at."""
    try:
        yield
    except LoraError as error:
        if os.fspath(local) not in f"{error.path}{error.problem}":
            raise
        raise _renamed(error, os.fspath(local), url) from error


def _renamed(error: Raised, old: str, new: str) -> Raised:
    return type(error)(
        error.problem.replace(old, new),
        path=error.path.replace(old, new) if error.path else None,
        keys=error.keys,
        candidates=error.candidates,
        expected=error.expected,
        todo=error.todo,
    )


def _remove(local: Path) -> None:
    try:
        if local.is_dir():
            shutil.rmtree(local)
        else:
            local.unlink(missing_ok=True)
    except OSError as error:
        raise ReadError(f"cannot be removed: {error.strerror or error}", path=local) from error
