"""A file that is written by two hands: ranges of other files by the kernel, behind the caller's back, and tensors."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType

from loratools.errors import NameResolutionError, ShapeError, WriteError
from loratools.io._copier import Copier, Syncer, sync_data
from loratools.io._layout import Layout, Slot, holds
from loratools.io.pieces import Range
from loratools.io.regions import Buffer, write_at

_TICK = 0.1  # seconds between two looks at the progress


class Output(Layout):
    """A file that comes into being: its first bytes, ranges of other files, and tensors that are put."""

    def __init__(
        self, path: str, size: int, slots: Mapping[str, Slot], ranges: Sequence[Range], head: bytes
    ) -> None:
        super().__init__(path, size, slots, ranges, head)
        self._missing = {*slots}
        self._kept: list[int] = []  # sizes of tensors that were there
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

    @property
    def taken(self) -> int:
        """How many tensors and pieces an interrupted run had written, which were found to be there."""
        return len(self._sizes_taken)

    @property
    def taken_bytes(self) -> int:
        """Their size."""
        return sum(self._sizes_taken)

    @property
    def _sizes_taken(self) -> list[int]:
        return self._kept + (self._copier.taken if self._copier is not None else [])

    def start(self) -> None:
        """Make room, and begin to copy in the background.

        Raises:
            MalformedFileError: The source is another than when its header was read.
            OSError: The output cannot be written, or the disk is too full for it.
        """
        try:
            self._target, cloned = self._opened()
            self._syncer = Syncer(self._target, self.log)
            self._wrote(len(self._head))
            if cloned:
                self._wrote(sum(piece.size for piece in self.pieces))
            self._copier = Copier(self._target, () if cloned else self.pieces, self._wrote, self.log)
        except BaseException:
            self.abort()
            raise

    @property
    def recording(self) -> bool:
        """Whether what is done now is worth a record."""
        return self.log is not None and self.log.recording

    def note(self, task: str, value: object) -> None:
        """Have it recorded that a task is done, as soon as what it has put is on the disk."""
        if self.log is not None:
            self.log.note(task, value)

    def holds(self, keys: Sequence[str], sums: Sequence[str]) -> bool:
        """Whether tensors of these checksums lie at their places."""
        with self._using() as target:
            return holds(target, [self.slots[key] for key in keys], sums)

    def keep(self, keys: Sequence[str], crcs: Sequence[int]) -> None:
        """Take tensors for put that an interrupted run has written.

        Args:
            keys: Which.
            crcs: The CRC-32 of each, where the file is ``summed``.

        Raises:
            NameResolutionError: One was not announced, or was put before.
            ConversionError: One shares its bytes with another, and differs from it.
        """
        for number, key in enumerate(keys):
            slot = self._claimed(key)
            if self.summed:
                self._agree(key, crcs[number])
            with self._lock:
                self._done += slot.stop - slot.start
                self._kept.append(slot.stop - slot.start)

    def put(self, key: str, data: Buffer) -> int:
        """Write a tensor at its place; threads may do so at once.

        Args:
            key: One of those that were announced, and each of them once.
            data: Its bytes: little-endian, contiguous, of its size in the output.

        Returns:
            Its CRC-32 where the file is ``summed``, else 0.

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
        crc = zlib.crc32(view) if self.summed else 0
        if self.summed:
            self._agree(key, crc)
        with self._using() as target:
            write_at(target, slot.start, view)
        self._wrote(len(view))
        return crc

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
                if self.log is not None:
                    self.log.record(self.log.taken())
            if progress is not None:
                progress(self.progress)
        finally:
            self.abort()

    def abort(self) -> None:
        """Stop copying and let go of the file, which stays as far as it came; nothing happens after ``finish``."""
        if self._copier is not None:
            self._copier.stop()
        if self._syncer is not None:
            self._syncer.stop(wait=self.log is not None and self.log.kept)
        with self._lock:
            target, self._target = self._target, -1
            self._lock.wait_for(
                lambda: not self._writing
            )  # the number may be another file's as soon as it is closed
            if target >= 0:
                self._last_records(target)
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

    def _last_records(self, target: int) -> None:
        """Where the run is to be resumed, have what was noted in its journal."""
        if self.log is not None and self.log.kept and self.log.waits:
            noted = self.log.taken()
            with suppress(OSError):  # a full disk must not hide why
                sync_data(target)
                self.log.record(noted)

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
                    f"tensor {key} was put before" if key in self.slots else f"no tensor {key} was announced",
                    path=self.path,
                    expected=f"{len(self._missing)} tensors are to be put, each of them once",
                )
            self._missing.remove(key)
            return self.slots[key]

    def _check_complete(self) -> None:
        if self._missing:
            raise WriteError(
                f"{len(self._missing)} of {len(self.slots)} tensors were not computed",
                path=self.path,
                keys=sorted(self._missing),
            )

    def _check_background(self) -> None:
        for worker in (self._copier, self._syncer):
            if worker is not None and worker.error is not None:
                raise worker.error
