"""Ranges of bytes moved between files: by the kernel where it can, and from and to memory at given offsets.

``copy_file_range`` copies inside the kernel, on some file systems by sharing blocks (Linux 4.5); ``sendfile`` does the
first on older ones; where neither is there (macOS, Windows), data passes through a small buffer.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from loratools.errors import MalformedFileError
from loratools.io import storage

Buffer = memoryview | bytearray | bytes

_CHUNK = 16 << 20  # per call to the kernel: short enough that a caller who wants to stop is heard soon
_PIECE = 8 << 20  # through memory
_MOST = 1 << 30  # per call from or to memory: macOS refuses 2 GiB, Linux does less than it was asked for
_FICLONE = 0x40049409  # from linux/fs.h
# What a system says that cannot do it this way, between these two files; a full disk is not among them.
_CANNOT = frozenset(
    {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.ENOTTY}
)
_BINARY: int = getattr(os, "O_BINARY", 0)  # on Windows
_seeking = threading.Lock()  # where a read or write takes two calls, they must not be torn apart


def copy_range(
    source: int | str,
    target: int,
    start: int,
    stop: int,
    at: int,
    *,
    path: str = "",
    step: Callable[[int], None] | None = None,
) -> None:
    """Copy the bytes from ``start`` to ``stop`` of one open file to offset ``at`` of another.

    Other threads may write elsewhere in ``target`` by :func:`write_at`; only one at a time may copy to it.

    Args:
        source: Descriptor to read, or a URL.
        target: Descriptor to write.
        start: Offset of the first byte.
        stop: Offset behind the last.
        at: Where the first goes.
        path: Name of the source, for messages.
        step: Called after each chunk with its size in bytes; what it raises ends the copying.

    Raises:
        MalformedFileError: The source ends before ``stop``.
        OSError: The system refuses.
    """
    ways = list(_WAYS)
    while start < stop:
        count = min(_CHUNK, stop - start)
        if isinstance(source, str):
            done = _from_elsewhere(source, target, start, count, at)
        else:
            done = _first_way(ways, source, target, start, count, at)
        if not done:
            raise _too_short(path, start, stop)
        start += done
        at += done
        if step is not None:
            step(done)


@contextmanager
def opened(path: str) -> Iterator[int | str]:
    """What :func:`copy_range` and :func:`read_at` read a file by: a descriptor; a URL as it is.

    Raises:
        OSError: It cannot be opened.
    """
    if storage.is_url(path):
        yield path
        return
    with open(path, "rb", buffering=0) as file:
        yield file.fileno()


def fetch(url: str, place: str | os.PathLike[str]) -> None:
    """Have a whole file at a URL in a file on this machine, piece by piece.

    Raises:
        LoraError: It cannot be read.
        OSError: It cannot be written.
    """
    said = storage.state(url)
    if not said.ranged:
        shutil.copyfile(storage.local(url), place)
        return
    with open(place, "wb") as target:
        copy_range(url, target.fileno(), 0, said.size, 0, path=url)


def clone_file(source: str, target: str) -> bool:
    """Make ``target`` share all blocks of ``source`` until one is written to (btrfs, XFS, bcachefs, ZFS).

    Returns:
        Whether it does; if not, ``target`` is as it was.
    """
    if sys.platform != "linux" or storage.is_url(source):
        return False
    import fcntl

    with open(source, "rb") as old, open(target, "r+b") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:  # another file system, or one that shares nothing
            return False
    return True


def preallocate(target: int, size: int) -> None:
    """Make a file ``size`` bytes long, and have its room now where the file system can promise it.

    Raises:
        OSError: The disk is too full, or a limit is too low.
    """
    os.ftruncate(target, size)
    reserve: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if reserve is not None and size:
        try:
            reserve(target, 0, size)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise


def read_at(
    file: int | str | os.PathLike[str], start: int, buffer: memoryview | bytearray, *, path: str = ""
) -> None:
    """Fill a buffer with the bytes of a file from ``start`` on; threads may do so at once.

    Args:
        file: A descriptor, or a path that is opened for it, or a URL.
        start: Offset of the first byte.
        buffer: Writable and contiguous.
        path: The file's name, for messages, where a descriptor is given.

    Raises:
        MalformedFileError: The file ends before the buffer is full.
        OSError: The system refuses.
    """
    if not isinstance(file, int):
        if storage.is_url(file):
            return storage.read_at(os.fspath(file), start, buffer)
        descriptor = os.open(file, os.O_RDONLY | _BINARY)
        try:
            return read_at(descriptor, start, buffer, path=os.fspath(file))
        finally:
            os.close(descriptor)
    view = memoryview(buffer).cast("B")
    done = 0
    while done < len(view):
        count = _READ(file, view[done : done + _MOST], start + done)
        if not count:
            raise _too_short(path, start + done, start + len(view))
        done += count
    return None


def write_at(file: int, start: int, data: Buffer) -> None:
    """Write all of ``data`` (contiguous) to an open file from ``start`` on; threads may do so at once.

    Raises:
        OSError: The system refuses.
    """
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += _WRITE(file, view[done : done + _MOST], start + done)


def _too_short(path: str, at: int, stop: int) -> MalformedFileError:
    return MalformedFileError(
        f"the file ends at byte {at:,}",
        path=path or None,
        expected=f"It held {stop:,} bytes or more when it was opened, or its header says so",
        todo="Let no other program change it meanwhile; if none does, get the file again",
    )


def _first_way(ways: list[_Way], source: int, target: int, start: int, count: int, at: int) -> int:
    """Copy some bytes by the first way that the system knows; those before it are taken off the list."""
    while len(ways) > 1:
        try:
            done = ways[0](source, target, start, count, at)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            done = 0
        if done:  # nothing may also mean a file system that only claims to be able to
            return done
        del ways[0]
    return ways[0](source, target, start, count, at)


def _from_elsewhere(source: str, target: int, start: int, count: int, at: int) -> int:
    buffer = bytearray(count)
    storage.read_at(source, start, buffer)
    write_at(target, at, buffer)
    return count


def _by_copy_file_range(source: int, target: int, start: int, count: int, at: int) -> int:
    copy: Any = getattr(os, "copy_file_range", None)
    if copy is None:
        return 0
    done: int = copy(source, target, count, start, at)
    return done


def _by_sendfile(source: int, target: int, start: int, count: int, at: int) -> int:
    if sys.platform != "linux":  # others send to sockets alone
        return 0
    os.lseek(target, at, os.SEEK_SET)
    return os.sendfile(target, source, start, count)


def _by_memory(source: int, target: int, start: int, count: int, at: int) -> int:
    buffer = memoryview(bytearray(min(_PIECE, count)))
    done = _READ(source, buffer, start)
    write_at(target, at, buffer[:done])
    return done


def _read_by_seeking(file: int, buffer: memoryview, start: int) -> int:
    with _seeking:
        os.lseek(file, start, os.SEEK_SET)
        data = os.read(file, min(len(buffer), _PIECE))
    buffer[: len(data)] = data
    return len(data)


def _read_by_offset(file: int, buffer: memoryview, start: int) -> int:
    return os.preadv(file, [buffer], start)


def _write_by_seeking(file: int, data: memoryview, start: int) -> int:
    with _seeking:
        os.lseek(file, start, os.SEEK_SET)
        return os.write(file, data)


def _write_by_offset(file: int, data: memoryview, start: int) -> int:
    return os.pwrite(file, data, start)


_Way = Callable[[int, int, int, int, int], int]
_WAYS: Sequence[_Way] = (_by_copy_file_range, _by_sendfile, _by_memory)
_READ = _read_by_offset if hasattr(os, "preadv") else _read_by_seeking
_WRITE = _write_by_offset if hasattr(os, "pwrite") else _write_by_seeking
