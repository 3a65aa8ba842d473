"""Work behind the caller's back: ranges copied by a thread, and what was written brought to the disk by another."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from loratools.errors import WriteError
from loratools.io.regions import copy_range

_SYNCED = 64 << 20  # bytes that are worth a call to bring them to the disk
_SYNC: Callable[[int], None] | None = getattr(os, "fdatasync", None)  # on Linux


class Range(NamedTuple):
    """Bytes of a file, and their place in another.

    Attributes:
        path: The file they are in.
        start: Offset of the first.
        stop: Offset behind the last.
        at: Offset of the first in the output.
    """

    path: str
    start: int
    stop: int
    at: int


class Syncer:
    """Brings a growing file to the disk while it is written, so that little is left for the end.

    The kernel itself begins only after seconds, or at gigabytes. Only where there is fdatasync.
    """

    def __init__(self, target: int) -> None:
        # Its own descriptor, for a call may outlast the output's. Errors are told once to both: they are kept here.
        self._target = os.dup(target)
        self._waiting = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="loratools-sync", daemon=True)
        self.error: OSError | None = None
        self._thread.start()

    def wrote(self, count: int) -> None:
        """So many bytes more were written."""
        with self._changed:
            self._waiting += count
            if self._waiting >= _SYNCED:
                self._changed.notify()

    def stop(self, *, wait: bool) -> None:
        """End it; without waiting, a call that is under way ends by itself."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if wait:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._some():
                if _SYNC is not None:
                    _SYNC(self._target)
        except OSError as error:
            self.error = error
        finally:
            os.close(self._target)

    def _some(self) -> bool:
        """Wait for enough bytes; false once there is nothing more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._waiting >= _SYNCED)
            self._waiting = 0
            return not self._stopped


class Copier:
    """Copies ranges of files into an open one, in a thread."""

    def __init__(self, target: int, ranges: Sequence[Range], wrote: Callable[[int], None]) -> None:
        """Begin.

        Args:
            target: The output's descriptor.
            ranges: What to copy.
            wrote: Called from the thread after each chunk, with its size in bytes.
        """
        self._target = target
        self._ranges = ranges
        self._wrote = wrote
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="loratools-copy", daemon=True)
        self.error: Exception | None = None
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after so many seconds at most."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End it, at the next chunk."""
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        try:
            for path, ranges in groupby(self._ranges, key=attrgetter("path")):
                with open(path, "rb", buffering=0) as source:
                    for _, start, stop, at in ranges:
                        copy_range(source.fileno(), self._target, start, stop, at, path=path, step=self._step)
        except _StoppedError:
            self.error = WriteError("the writing was given up", expected="What was written is not whole")
        except Exception as error:
            self.error = error  # raised to whoever writes next, or waits

    def _step(self, count: int) -> None:
        self._wrote(count)
        if self._stopped:
            raise _StoppedError


class _StoppedError(Exception):
    """The caller wants no more."""


def gaps(path: str, size: int, taken: Sequence[tuple[int, int]]) -> list[Range]:
    """What of a file lies in none of the ranges ``taken``, (start, stop) in any order, to stay where it is."""
    found = []
    at = 0
    for start, stop in sorted(taken):
        if start > at:
            found.append(Range(path, at, start, at))
        at = max(at, stop)
    if at < size:
        found.append(Range(path, at, size, at))
    return found


def joined(ranges: Sequence[Range]) -> list[Range]:
    """The same with those made one that follow each other in both files, and empty ones left out."""
    found: list[Range] = []
    for item in ranges:
        if item.start == item.stop:
            continue
        if found:
            last = found[-1]
            if (item.path, item.start, item.at) == (last.path, last.stop, last.at + last.stop - last.start):
                found[-1] = last._replace(stop=item.stop)
                continue
        found.append(item)
    return found
