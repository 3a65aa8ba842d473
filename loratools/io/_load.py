"""The data of one tensor of a base model, read into memory of its own."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING

from loratools.errors import LoraError, MalformedFileError, ReadError
from loratools.io import storage
from loratools.io.mapped import TensorFile
from loratools.io.reader import open_tensors
from loratools.io.regions import read_at
from loratools.tensors import DTYPES, nbytes

if TYPE_CHECKING:
    import torch

    from loratools.io.base import Weight

_KEPT = 128 << 20  # bytes: larger tensors are few, and are not worth memory that is held for them


class Room(threading.local):
    """Memory for one tensor in each thread, used again for the next.

    Memory that is given back and asked for anew is cleared by the system page by page, which takes longer than
    reading a tensor into it.
    """

    _held: torch.Tensor | None = None

    def of(self, size: int) -> torch.Tensor:
        """Memory for so many bytes, (size,) of uint8, with any values; this thread's last is the same."""
        import torch

        if size > _KEPT:
            return torch.empty(size, dtype=torch.uint8)
        if self._held is None or len(self._held) < size:
            self._held = None  # what is too small makes room first
            self._held = torch.empty(size, dtype=torch.uint8)
        return self._held[:size]


def load(weight: Weight, room: Room | None = None) -> torch.Tensor:
    """The tensor in its store dtype, in memory of its own.

    A tensor without a ``start`` is taken from its file by torch; the last such file stays open for the next.

    Args:
        weight: Which.
        room: Memory that it may lie in, until the same thread loads another there.

    Raises:
        MalformedFileError: torch has no dtype for it (4 and 6 bits), or the file is shorter than it was.
        ReadError: It cannot be read.
    """
    if weight.start is not None or not weight.nbytes:
        return _read(weight, weight.start or 0, weight.shape, room)
    import torch

    return _from_file(weight).clone(memory_format=torch.contiguous_format)


def load_rows(weight: Weight, start: int, stop: int, room: Room | None = None) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of a tensor of one dimension or more, as by :func:`load`.

    Raises:
        MalformedFileError: As for ``load``.
        ReadError: As for ``load``.
    """
    shape = (stop - start, *weight.shape[1:])
    if weight.start is not None or not weight.nbytes:
        at = (weight.start or 0) + nbytes((start, *weight.shape[1:]), weight.dtype)
        return _read(weight, at, shape, room)
    import torch

    return _from_file(weight)[start:stop].clone(memory_format=torch.contiguous_format)


def _read(weight: Weight, at: int, shape: tuple[int, ...], room: Room | None = None) -> torch.Tensor:
    """The tensor of this shape whose bytes begin at ``at``."""
    import torch

    row = DTYPES[weight.dtype]
    kind: torch.dtype | None = getattr(torch, row.torch, None) if row.torch and row.bits >= 8 else None
    if kind is None:
        raise MalformedFileError(
            f"data of dtype {weight.dtype} cannot be computed with",
            path=weight.file,
            keys=[weight.key],
            expected="A dtype of 8 bits or more that this torch knows was expected",
            todo="Give the model in another dtype",
        )
    if 0 in shape:
        return torch.empty(shape, dtype=kind)
    size = nbytes(shape, weight.dtype)
    data = torch.empty(size, dtype=torch.uint8) if room is None else room.of(size)
    try:
        read_at(weight.file, at, data.numpy().data)
    except LoraError:
        raise
    except OSError as error:
        raise _unreadable(weight, error) from error
    return data.view(kind).reshape(shape)


def _from_file(weight: Weight) -> torch.Tensor:
    """A tensor whose bytes do not lie in its file as they are."""
    try:
        tag = storage.tag(weight.file)
    except OSError as error:
        raise _unreadable(weight, error) from error
    opened = _opened(weight.file, tag)
    if weight.key not in opened.tensors:
        raise ReadError(
            "the file has changed: a tensor is gone",
            path=weight.file,
            keys=[weight.key],
            todo="Keep the file as it is until the work is done",
        )
    return opened.tensors[weight.key].load()


def _unreadable(weight: Weight, error: OSError) -> ReadError:
    return ReadError(
        f"cannot be read: {error.strerror or error}",
        path=weight.file,
        keys=[weight.key],
        todo="Check that it is still there, and its permissions",
    )


@lru_cache(maxsize=1)
def _opened(path: str, tag: str) -> TensorFile:  # noqa: ARG001 - a changed file is another
    """A file that has to be opened as a whole, which takes long: kept until another is asked for."""
    return open_tensors(path)
