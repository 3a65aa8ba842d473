"""A file that is written by two hands: ranges of other files by the kernel, behind the caller's back, and tensors."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

from loratools.errors import ConversionError, NameResolutionError, ShapeError, WriteError
from loratools.io._copier import Copier, Range, Syncer
from loratools.io.regions import Buffer, clone_file, preallocate, write_at

_TICK = 0.1  # seconds between two looks at the progress


class Slot(NamedTuple):
    """Where a tensor goes: from ``start`` to ``stop`` in the output."""

    start: int
    stop: int


class Output:
    """A file that comes into being: its first bytes, ranges of other files, and tensors that are put.

    Attributes:
        path: The file.
        total: Its size in bytes.
    """

    def __init__(
        self, path: str, size: int, slots: Mapping[str, Slot], ranges: Sequence[Range], head: bytes
    ) -> None:
        self.path = path
        self.total = size
        self._slots = slots
        self._ranges = ranges
        self._head = head
        self._whole = ""  # a file of which all ranges stay where they are: the two may share blocks
        self._tied = False  # whether tensors may share their bytes, and what is put has to be compared
        self._crcs: dict[tuple[int, int], int] = {}
        self._missing = {*slots}
        self._done = 0
        self._target = -1
        self._writing = 0  # calls that are using the descriptor
        self._lock = threading.Condition()
        self._copier: Copier | None = None
        self._syncer: Syncer | None = None

    @property
    def progress(self) -> int:
        """Bytes of the output that are written, of ``total``."""
        return min(self._done, self.total)

    def start(self) -> None:
        """Make room, and begin to copy in the background.

        Raises:
            MalformedFileError: The source is another than when its header was read.
            OSError: The output cannot be written, or the disk is too full for it.
        """
        try:
            self._check_source()
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._target = os.open(self.path, flags, 0o666)
            cloned = bool(self._whole) and clone_file(self._whole, self.path)
            if not cloned:
                preallocate(self._target, self.total)
            self._syncer = Syncer(self._target)
            if self._head:
                write_at(self._target, 0, self._head)
                self._wrote(len(self._head))
            if cloned:
                self._wrote(sum(item.stop - item.start for item in self._ranges))
            self._copier = Copier(self._target, () if cloned else self._ranges, self._wrote)
        except BaseException:
            self.abort()
            raise

    def put(self, key: str, data: Buffer) -> None:
        """Write a tensor at its place; threads may do so at once.

        Args:
            key: One of those that were announced, and each of them once.
            data: Its bytes: little-endian, contiguous, of its size in the output.

        Raises:
            NameResolutionError: It was not announced, or was put before.
            ShapeError: It is of another size.
            ConversionError: It shares its bytes with another that was put, and differs from it.
            LoraError: Copying failed in the background.
            OSError: The system refuses, now or in the background.
        """
        self._check_background()
        slot = self._claimed(key)
        view = memoryview(data).cast("B")
        if len(view) != slot.stop - slot.start:
            raise ShapeError(
                f"tensor {key}: its data has {len(view):,} bytes",
                path=self.path,
                expected=f"Its place in the file holds {slot.stop - slot.start:,}",
            )
        if self._tied and view:
            self._note(key, slot, zlib.crc32(view))
        with self._using() as target:
            write_at(target, slot.start, view)
        self._wrote(len(view))

    def finish(self, progress: Callable[[int], None] | None = None) -> None:
        """Wait for the copying, and have all of it on the disk.

        Args:
            progress: Called a few times a second with the count of bytes that are written, of ``total``.

        Raises:
            WriteError: Tensors were announced and not put.
            LoraError: Copying failed in the background.
            OSError: The system refuses, now or in the background.
        """
        try:
            self._check_complete()
            with self._using() as target:
                while self._copier is not None and not self._copier.wait(_TICK):
                    self._check_background()
                    if progress is not None:
                        progress(self.progress)
                self._check_background()
                self._complete(target)
                if self._syncer is not None:
                    self._syncer.stop(wait=True)
                self._check_background()
                os.fsync(target)
            if progress is not None:
                progress(self.progress)
        finally:
            self.abort()

    def abort(self) -> None:
        """Stop copying and let go of the file, which stays as far as it came; nothing happens after ``finish``."""
        if self._copier is not None:
            self._copier.stop()
        if self._syncer is not None:
            self._syncer.stop(wait=False)
        with self._lock:
            target, self._target = self._target, -1
            self._lock.wait_for(
                lambda: not self._writing
            )  # the number may be another file's as soon as it is closed
            if target >= 0:
                os.close(target)

    def __enter__(self) -> Output:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def _check_source(self) -> None:
        """Refuse a source that changed since its header was read."""

    def _complete(self, target: int) -> None:
        """Put right what depends on all the data."""

    @contextmanager
    def _using(self) -> Iterator[int]:
        """The descriptor, which is not closed meanwhile."""
        with self._lock:
            if self._target < 0:
                raise WriteError(
                    "the output is not open",
                    path=self.path,
                    expected="Tensors are put after start() and before finish() or abort()",
                )
            self._writing += 1
        try:
            yield self._target
        finally:
            with self._lock:
                self._writing -= 1
                self._lock.notify_all()

    def _wrote(self, count: int) -> None:
        with self._lock:
            self._done += count
        if self._syncer is not None:
            self._syncer.wrote(count)

    def _claimed(self, key: str) -> Slot:
        with self._lock:
            if key not in self._missing:
                raise NameResolutionError(
                    f"tensor {key} was put before"
                    if key in self._slots
                    else f"no tensor {key} was announced",
                    path=self.path,
                    expected=f"{len(self._missing)} tensors are to be put, each of them once",
                )
            self._missing.remove(key)
            return self._slots[key]

    def _note(self, key: str, slot: Slot, crc: int) -> None:
        with self._lock:
            if self._crcs.setdefault(slot, crc) != crc:
                raise ConversionError(
                    f"tensor {key} shares its bytes with another and would become different from it",
                    path=self.path,
                    expected="Tied tensors change together",
                    todo="Write safetensors, where each has its own",
                )

    def _check_complete(self) -> None:
        if self._missing:
            raise WriteError(
                f"{len(self._missing)} of {len(self._slots)} tensors were not computed",
                path=self.path,
                keys=sorted(self._missing),
            )

    def _check_background(self) -> None:
        for worker in (self._copier, self._syncer):
            if worker is not None and worker.error is not None:
                raise worker.error
