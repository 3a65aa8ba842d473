"""A lock that one process holds and the system lets go of when the process ends, however it ends."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress

_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK})


class HeldError(OSError):
    """Another process holds the lock."""


class Lock:
    """A lock on a file, which is made where there is none; gone with :meth:`release`, or with the process."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Take the lock.

        Raises:
            HeldError: Another process has it.
            OSError: The file cannot be made.
        """
        self.path = os.fspath(path)
        while True:
            handle = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                _take(handle)
            except OSError as error:
                os.close(handle)
                if error.errno in _HELD:
                    raise HeldError(error.errno, "another process is at work on it", self.path) from error
                raise
            if _is_at(handle, self.path):
                break
            os.close(handle)  # its last holder removed the file meanwhile
        self._handle: int | None = handle

    def release(self) -> None:
        """Remove the file and let go of the lock."""
        handle, self._handle = self._handle, None
        if handle is not None:
            if sys.platform == "win32":  # which removes no open file
                os.close(handle)
            with suppress(OSError):
                os.unlink(self.path)
            if sys.platform != "win32":
                os.close(handle)


def _take(handle: int) -> None:
    """Lock the file, without waiting; a file system that knows no locks is taken at its word."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        return
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def _is_at(handle: int, path: str) -> bool:
    """Whether the open file is the one of this name, still."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
