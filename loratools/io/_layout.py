"""A file that is laid out beforehand, with its size and its first bytes: what goes where is known then."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loratools.errors import ConversionError
from loratools.io import pieces
from loratools.io._file_log import FileLog
from loratools.io.checksums import file_checksum
from loratools.io.pieces import Piece, Range
from loratools.io.regions import clone_file, preallocate, write_at

BINARY: int = getattr(os, "O_BINARY", 0)  # on Windows


class Slot(NamedTuple):
    """Where a tensor goes: from ``start`` to ``stop`` in the output."""

    start: int
    stop: int


class Layout:
    """Where everything of a file goes; others write it, at any time and in any order, between the two calls here.

    Attributes:
        path: The file.
        total: Its size in bytes.
        slots: Where each tensor goes.
        pieces: What is copied from other files.
        summed: Whether the CRC-32 of all tensors has to be known in the end.
        log: What of it is done already, and where it is noted; None where there is no journal.
    """

    def __init__(
        self, path: str, size: int, slots: Mapping[str, Slot], ranges: Sequence[Range], head: bytes
    ) -> None:
        self.path = path
        self.total = size
        self.slots = slots
        self.pieces: Sequence[Piece] = pieces.cut(ranges)
        self.summed = False  # tensors may share their bytes, and what is put has to be compared
        self.log: FileLog | None = None
        self._head = head
        self._whole = ""  # a file of which all ranges stay where they are: the two may share blocks
        self._crcs: dict[tuple[int, int], int] = {}
        self._comparing = threading.Lock()

    def journalled(self, log: FileLog) -> None:
        """Have what is done noted, and go on with what an interrupted run has done; before the file is begun."""
        self.log = log

    def known(self, task: str) -> Any:
        """What the journal of an interrupted run says of a task on this file, or None."""
        return None if self.log is None else self.log.known.get(task)

    def lay_out(self) -> bool:
        """Make the file with its size and its first bytes, and have that on the disk.

        Returns:
            Whether the pieces are in it already: it shares all blocks with its source.

        Raises:
            MalformedFileError: The source is another than when its header was read.
            OSError: The output cannot be written, or the disk is too full for it.
        """
        target, cloned = self._opened()
        try:
            os.fsync(target)
        finally:
            os.close(target)
        if self.log is not None:
            self.log.record(self.log.taken())
        return cloned

    def complete(self, crcs: Mapping[str, int]) -> None:
        """Put right what depends on all the data, and have the file on the disk.

        Args:
            crcs: The CRC-32 of each tensor, where the file is ``summed``.

        Raises:
            ConversionError: Tensors that share their bytes differ.
            OSError: The system refuses.
        """
        for key, crc in crcs.items():
            self._agree(key, crc)
        target = os.open(self.path, os.O_RDWR | BINARY)
        try:
            self._complete(target)
            os.fsync(target)
        finally:
            os.close(target)

    def _opened(self) -> tuple[int, bool]:
        """The file's descriptor, and whether all that is copied is in it."""
        self._check_source()
        target = os.open(self.path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
        try:
            return target, self._begun(target)
        except BaseException:
            os.close(target)
            raise

    def _begun(self, target: int) -> bool:
        log = self.log
        if log is not None and os.fstat(target).st_size != self.total:
            log.forget()
        kept = log is not None and bool(log.known)
        cloned = not kept and self._clone()
        if not cloned and not kept:
            preallocate(target, self.total)
        if self._head:
            write_at(target, 0, self._head)
        if cloned and log is not None:
            log.note_clone()
        return cloned

    def _clone(self) -> bool:
        return bool(self._whole) and clone_file(self._whole, self.path)

    def _agree(self, key: str, crc: int) -> None:
        """Refuse a tensor that differs from another in the same place."""
        slot = self.slots[key]
        if slot.start == slot.stop:
            return
        with self._comparing:
            if self._crcs.setdefault(slot, crc) == crc:
                return
        raise ConversionError(
            f"tensor {key} shares its bytes with another and would become different from it",
            path=self.path,
            expected="Tied tensors change together",
            todo="Write safetensors, where each has its own",
        )

    def _check_source(self) -> None:
        """Refuse a source that changed since its header was read."""

    def _complete(self, target: int) -> None:
        """Put right what depends on all the data."""


def holds(file: int, slots: Sequence[Slot], sums: Sequence[str]) -> bool:
    """Whether an open file has data of these checksums at these places.

    Raises:
        MalformedFileError: It is shorter.
        OSError: It cannot be read.
    """
    return all(file_checksum(file, *slot) == said for slot, said in zip(slots, sums, strict=True))
