"""One task of a bake that any process can do: tensors and ranges of one file, written to their places.

The file was laid out beforehand. What a task writes follows from the task alone, so that one that is run twice, or on
another machine, leaves the same bytes. It gives back records for the journal, and no tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from loratools.errors import ShapeError, WriteError
from loratools.io import pieces
from loratools.io.pieces import Piece
from loratools.io.regions import opened, read_at, write_at
from loratools.io.rewrite import Slot, holds, sync_data
from loratools.ops import _bake_records, _bake_run
from loratools.ops._bake_run import Options, Task
from loratools.tensors import torch_bytes

if TYPE_CHECKING:
    from loratools.io._load import Room

_READ = 4 << 20  # bytes at a time, where they are only read
_BINARY: int = getattr(os, "O_BINARY", 0)  # on Windows


class Part(NamedTuple):
    """What is recorded as one.

    Attributes:
        work: Tensors to compute, or ranges to copy.
        slots: Where the tensors go, in the order of ``work.keys``; empty for ranges.
        known: What the journal of an interrupted run says of it; None where it says nothing.
        there: For ranges: whether they should be there already.
    """

    work: Task | Piece
    slots: tuple[Slot, ...] = ()
    known: Any = None
    there: bool = False


class Write(NamedTuple):
    """A task: parts of one file.

    Attributes:
        path: The output's file.
        size: That it was laid out with, in bytes.
        options: How to compute.
        parts: What to do.
        summed: Whether the CRC-32 of tensors is wanted.
    """

    path: str
    size: int
    options: Options
    parts: tuple[Part, ...]
    summed: bool = False


class Written(NamedTuple):
    """A part that is on the disk.

    Attributes:
        name: Of its work.
        record: For the journal.
        taken: Whether all of it was there.
    """

    name: str
    record: Any
    taken: bool


def write(task: Write) -> tuple[Written, ...]:
    """Do a task, and have what it wrote on the disk.

    Raises:
        WriteError: The output's file is not as it was laid out.
        LoraError: As the baker's, or a source cannot be read.
        OSError: The system refuses.
    """
    from loratools.io._load import Room

    room = Room()
    with _laid_out(task) as target:
        found = tuple(_done(task, part, target, room) for part in task.parts)
        if not all(each.taken for each in found):
            sync_data(target)
    return found


def sample(task: Write) -> None:
    """Read and compute as :func:`write` does, and write nothing.

    Raises:
        LoraError: As for ``write``.
        OSError: As for ``write``.
    """
    for part in task.parts:
        if isinstance(part.work, Task):
            _bake_run.made(task.options, part.work)
            continue
        buffer = memoryview(bytearray(min(_READ, part.work.size)))
        for each in part.work.ranges:
            with opened(each.path) as source:
                for at in range(each.start, each.stop, _READ):
                    read_at(source, at, buffer[: min(_READ, each.stop - at)], path=each.path)


def bind(task: Write, device: str) -> Write:
    """The same task for a device."""
    return task._replace(options=task.options._replace(device=device))


@contextmanager
def _laid_out(task: Write) -> Iterator[int]:
    """The output's file, open."""
    try:
        target = os.open(task.path, os.O_RDWR | _BINARY)
    except FileNotFoundError as error:
        raise _lost(task, "it is not there") from error
    try:
        size = os.fstat(target).st_size
        if size != task.size:
            raise _lost(task, f"it has {size:,} bytes instead of {task.size:,}")
        yield target
    finally:
        os.close(target)


def _lost(task: Write, how: str) -> WriteError:
    return WriteError(
        f"the half-made output is not as it was laid out: {how}",
        path=task.path,
        expected="Every worker sees the output's folder under the same name",
        todo="Write to storage that all workers share, and let no other program change it",
    )


def _done(task: Write, part: Part, target: int, room: Room) -> Written:
    if isinstance(part.work, Piece):
        copied = pieces.restore(part.work, target) if part.there else pieces.copy(part.work, target)
        return Written(part.work.name, None, copied == 0)
    said = _bake_records.read(part.known, part.work.keys, key=part.work.told, summed=task.summed)
    if said is not None and holds(target, part.slots, said.sums):
        return Written(part.work.name, part.known, True)
    made = _bake_run.made(task.options, part.work, room)
    data = [memoryview(torch_bytes(tensor)).cast("B") for _, tensor in made.tensors]
    for slot, each, key in zip(part.slots, data, part.work.keys, strict=True):
        _check_size(task, key, slot, each)
        write_at(target, slot.start, each)
    record = _bake_records.record(data, _crcs(data) if task.summed else (), made.result)
    return Written(part.work.name, record, False)


def _check_size(task: Write, key: str, slot: Slot, data: memoryview) -> None:
    if len(data) != slot.stop - slot.start:
        raise ShapeError(
            f"tensor {key}: its data has {len(data):,} bytes",
            path=task.path,
            expected=f"Its place in the file holds {slot.stop - slot.start:,}",
        )


def _crcs(data: Sequence[memoryview]) -> list[int]:
    import zlib

    return [zlib.crc32(each) for each in data]
