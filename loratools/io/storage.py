"""Where inputs lie: on this machine, at an fsspec URL (``s3://…``), or in a repository of a model hub (``hf://…``).

Upper layers see names. What is no URL goes to the system as it is, and a URL to the store of its kind (see
:mod:`loratools.io.stores`), whose libraries are imported then: nothing reaches for a network unless a URL was given.
Names are joined to folders by ``os.path.join``, whatever the folder is.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

from loratools.errors import LoraError, MalformedFileError, MissingFileError, OptionError, ReadError
from loratools.io import unchanged

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.io.stores import State, Store

PathLike = str | os.PathLike[str]

HUB = "hf://"
TEXT = 64 << 20
"""Bytes of the longest configuration or index that is read: of the largest models an index has some millions."""
# A scheme has two letters at least: one is a drive of Windows. Schemes may be chained ("simplecache::s3://…").
_URL = r"(?:[A-Za-z][\w+.-]+::)*[A-Za-z][\w+.-]+://"
_CHUNK = 64 << 20  # bytes asked for at once, where more are wanted: a request that fails is begun anew


def is_url(path: PathLike) -> bool:
    """Whether this is the URL of a file or folder elsewhere, rather than a path."""
    text = os.fspath(path)
    return "://" in text and re.match(_URL, text) is not None


def is_file(path: str) -> bool:
    """Whether a file is there, as by ``os.path.isfile``."""
    if not is_url(path):
        return os.path.isfile(path)
    found = _state(path)
    return found is not None and not found.folder


def is_dir(path: str) -> bool:
    """Whether a folder is there, as by ``os.path.isdir``."""
    if not is_url(path):
        return os.path.isdir(path)
    found = _state(path)
    return found is not None and found.folder


def real(path: PathLike) -> str:
    """A path without links, as by ``os.path.realpath``; a URL as it is."""
    text = os.fspath(path)
    return text if is_url(text) else os.path.realpath(text)


def whole(path: PathLike) -> str:
    """A path from the root, as by ``os.path.abspath``; a URL as it is."""
    text = os.fspath(path)
    return text if is_url(text) else os.path.abspath(text)


def below(folder: str, name: str) -> str:
    r"""What lies below a folder, by its path from there with "/" between names.

    Windows takes no "/" in paths that begin with its ``\\?\``.
    """
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, *name.split("/"))


def joined(folder: str, path: str) -> str:
    """A path seen from a folder; one from the root, or a URL, as it is."""
    return path if is_url(path) else os.path.join(folder, path)


def same(one: str, other: str) -> bool:
    """Whether two names are of one file or folder, which is there."""
    if is_url(one) or is_url(other):
        return one == other
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def names(folder: str) -> list[str]:
    """The names in a folder, in any order, as by ``os.listdir``.

    Raises:
        OSError: It cannot be read.
    """
    return _store(folder).names(_spelled(folder)) if is_url(folder) else os.listdir(folder)


def tree(folder: str) -> Mapping[str, int]:
    """The sizes in bytes of all files below a URL, by path relative to it with "/" between names.

    Raises:
        ReadError: It cannot be read.
    """
    return _store(folder).tree(_spelled(folder))


def size(path: str) -> int:
    """Of a file, in bytes, as by ``os.path.getsize``.

    Raises:
        OSError: It cannot be read.
    """
    return state(path).size if is_url(path) else os.path.getsize(path)


def tag(path: str, *, afresh: bool = False) -> str:
    """What tells a file's content from another's without reading it: its size with its time, or the store's hash.

    Args:
        path: Which.
        afresh: Whether a store is asked though it was asked lately; a hub's commit stays what it is.

    Raises:
        OSError: It cannot be read.
    """
    if is_url(path):
        if afresh and not path.startswith(HUB):
            from loratools.io import remote

            remote.afresh(path)
        found = state(path)
        return found.whole_tag
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def state(url: str) -> State:
    """What the store of a URL knows of it.

    Raises:
        MissingFileError: There is nothing.
        ReadError: The store cannot be asked.
    """
    found = _state(url)
    if found is None:
        raise MissingFileError(
            "nothing is there", path=url, expected="A file or folder was expected", todo="Check the URL"
        )
    return found


def pinned(path: PathLike) -> str:
    """A name of the same that goes on meaning what it means now: a branch of a repository becomes its last commit.

    Raises:
        LoraError: A URL whose store cannot be asked.
    """
    text = os.fspath(path)
    return _store(text).pinned(_spelled(text)) if is_url(text) else text


def read_at(url: str, start: int, buffer: memoryview | bytearray) -> None:
    """Fill a buffer with the bytes of a file at a URL from ``start`` on; threads may do so at once.

    Raises:
        MalformedFileError: The file ends before the buffer is full.
        ReadError: It cannot be read.
    """
    view = memoryview(buffer).cast("B")
    store, name = _store(url), _spelled(url)
    for begin in range(0, len(view), _CHUNK):
        part = view[begin : begin + _CHUNK]
        data = store.read(name, start + begin, start + begin + len(part))
        if len(data) != len(part):
            raise _other_length(url, start + begin, len(part), len(data))
        part[:] = data


def read_all(path: str, limit: int) -> bytes:
    """The content of a small file.

    Raises:
        MalformedFileError: It has more than ``limit`` bytes.
        OSError: It cannot be read.
    """
    if not is_url(path):
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for whoever writes to it
            raise ReadError("not a regular file", path=path, todo="Give a file on disk")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    else:
        found = state(path)
        unchanged.note_elsewhere(path, found.whole_tag)
        count = limit + 1 if found.size < 0 else min(found.size, limit + 1)
        if found.ranged:
            data = bytes(_store(path).read(_spelled(path), 0, count))
        else:
            return read_all(local(path), limit)
    if len(data) > limit:
        raise MalformedFileError(
            f"more than {limit:,} bytes",
            path=path,
            expected="A configuration or an index is shorter",
            todo="Check that it is the file that was meant",
        )
    return data


def local(path: str) -> str:
    """A path on this machine with a file's content: its own, or that of a whole copy.

    Raises:
        LoraError: A file at a URL that cannot be fetched.
    """
    return _store(path).fetched(_spelled(path)) if is_url(path) else path


def _state(url: str) -> State | None:
    return _store(url).state(_spelled(url))


def _spelled(url: str) -> str:
    """A URL whose folders and names may have been joined by the system's separator."""
    return url.replace(os.sep, "/").rstrip("/")


def _store(url: str) -> Store:
    if url.startswith(HUB):
        from loratools.io.hub import hub

        return hub()
    from loratools.io.remote import files

    return files()


def missing_package(url: str, package: str, extra: str) -> OptionError:
    """The error for a URL that needs a package that is not installed."""
    how = f"pip install 'loratools[{extra}]'" if extra else f"pip install {package}"
    return OptionError(
        f"this kind of URL is read through the package {package}, which is not installed",
        path=url,
        expected="A path on this machine needs no package",
        todo=f"Run: {how}",
    )


def _other_length(url: str, start: int, wanted: int, found: int) -> LoraError:
    if found > wanted:
        return ReadError(
            f"{wanted:,} bytes were asked for, and {found:,} came",
            path=url,
            expected="A server that answers requests for parts of files was expected",
            todo="Download the file, and give its path",
        )
    return MalformedFileError(
        f"the file ends at byte {start + found:,}",
        path=url,
        expected=f"It held {start + wanted:,} bytes or more when it was opened, or its header says so",
        todo="Let no other program change it meanwhile; if none does, get the file again",
    )
