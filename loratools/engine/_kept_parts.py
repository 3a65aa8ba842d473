"""Part files: tensors behind one another as plain bytes, each in a place that a journal names."""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.engine._kept_codec import DamagedError
from loratools.errors import MalformedFileError, WriteError
from loratools.io.atomic import sync_folder
from loratools.io.checksums import checksum, file_checksum
from loratools.io.regions import read_at, write_at
from loratools.tensors import DTYPES, LazySource, TensorRef, carried, dtype_of, nbytes, torch_bytes

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"part-[0-9a-f]{16}\.bin", re.ASCII)
_ALIGNED = 64  # bytes: where a tensor begins
_MOST = 1 << 48  # of an axis: nothing that torch could not count
_BINARY: int = getattr(os, "O_BINARY", 0)  # on Windows
_SYNC: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)  # the first is not on macOS and Windows


class HeldSource:
    """A tensor in memory, until it is moved to a part file: from then on every look reads it anew.

    Pickled, it is the data: the file is gone when the run ends.
    """

    __slots__ = ("_lies",)

    def __init__(self, lies: torch.Tensor | tuple[str, int, int]) -> None:
        """Hold a tensor of the CPU, or what lies in a file from one offset (bytes) to another."""
        self._lies = lies

    def raw(self) -> memoryview:
        """The bytes; those of a file in memory of their own."""
        lies = self._lies
        if not isinstance(lies, tuple):
            return torch_bytes(lies)
        path, start, stop = lies
        buffer = memoryview(bytearray(stop - start))
        if stop > start:
            read_at(path, start, buffer)
        return buffer

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The tensor, which must not be written to."""
        lies = self._lies
        if not isinstance(lies, tuple):
            return lies
        import torch

        path, start, stop = lies
        data = torch.empty(stop - start, dtype=torch.uint8)
        if data.numel():
            read_at(path, start, data.numpy().data)
        kind: torch.dtype = getattr(torch, DTYPES[dtype].torch)
        return data.view(kind).reshape(shape)

    def first(self, size: int) -> HeldSource:
        """The first bytes of what lies in a file, or the first values of so many bytes of what is held."""
        lies = self._lies
        if isinstance(lies, tuple):
            return HeldSource((lies[0], lies[1], lies[1] + size))
        return HeldSource(lies.reshape(-1)[: size // lies.element_size()])

    def moved(self, path: str, start: int, stop: int) -> None:
        """Let go of the tensor: it lies in a file now."""
        self._lies = (path, start, stop)

    def __reduce__(self) -> tuple[Any, ...]:
        return carried(self.raw())


def held(name: str, tensor: torch.Tensor) -> TensorRef:
    """A reference to a tensor in memory that may be moved to a part file."""
    cpu = tensor.detach().cpu()
    return TensorRef(name, tuple(cpu.shape), dtype_of(cpu), HeldSource(cpu))


def head(ref: TensorRef, rows: int) -> TensorRef:
    """The first rows of a tensor, (rows, …); where it lies in a part file, the others are never read.

    Args:
        ref: Not transposed, with as many rows or more.
        rows: A count.
    """
    shape = (rows, *ref.shape[1:])
    if isinstance(ref.source, HeldSource):
        return ref._replace(shape=shape, source=ref.source.first(nbytes(shape, ref.dtype)))
    return ref._replace(shape=shape, source=LazySource(lambda: ref.load()[:rows]))


class PartFile:
    """A new file of a work folder that one process appends to, in any thread."""

    def __init__(self, folder: str) -> None:
        """Make it.

        Raises:
            WriteError: The system refuses.
        """
        self._folder = folder
        self._name = f"part-{os.urandom(8).hex()}.bin"
        self._path = os.path.join(folder, self._name)
        self._size = 0
        self._turn = threading.Lock()
        self._handle: int | None = None
        try:
            self._handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _BINARY, 0o666)
        except OSError as error:
            raise self._refused(error) from error
        sync_folder(Path(folder))

    def put(self, ref: TensorRef) -> list[Any]:
        """Append a tensor, and say where it lies: file, offset, shape as stored, dtype, checksum.

        Raises:
            WriteError: The disk is full, or refuses.
        """
        data = ref.raw()
        with self._turn:
            start = self._size
            self._size = start + -(-data.nbytes // _ALIGNED) * _ALIGNED
        try:
            if data.nbytes:
                write_at(self._descriptor, start, data)
        except OSError as error:
            raise self._refused(error) from error
        if isinstance(ref.source, HeldSource):
            ref.source.moved(self._path, start, start + data.nbytes)
        return [self._name, start, list(ref.stored_shape), ref.dtype, checksum(data)]

    def sync(self) -> None:
        """Have it all on the disk.

        Raises:
            WriteError: The system refuses.
        """
        try:
            _SYNC(self._descriptor)
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Let go of the file."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        self.close()

    @property
    def _descriptor(self) -> int:
        if self._handle is None:
            raise ValueError("the part file was closed")
        return self._handle

    def _refused(self, error: OSError) -> WriteError:
        return WriteError(
            f"cannot be written: {error.strerror or error}",
            path=self._path,
            expected="Results wait there until the output is written; they take about as much room",
            todo="Make room, check the permissions, or choose another folder for the output",
        )


def place(folder: str, said: Any, *, check: bool) -> TensorRef:
    """A tensor in a part file, without a name.

    Args:
        folder: The work folder.
        said: What ``PartFile.put`` gave, or what somebody else has made of it.
        check: Whether its bytes are looked at now and compared with the checksum; what another machine has just put
            there may not be seen before the file is opened.

    Raises:
        DamagedError: It is not there as it was put.
    """
    if not isinstance(said, list) or [type(each) for each in said] != [str, int, list, str, str]:
        raise DamagedError("no place")
    name, start, sizes, dtype, wanted = said
    sound = start >= 0 and all(type(size) is int and 0 <= size < _MOST for size in sizes)
    if not (sound and _NAME.fullmatch(name) and dtype in DTYPES and DTYPES[dtype].torch):
        raise DamagedError("no place")
    path, shape = os.path.join(folder, name), tuple(sizes)
    try:
        stop = start + nbytes(shape, dtype)
        if check:
            _check(path, start, stop, wanted)
    except (OSError, MalformedFileError) as error:
        raise DamagedError(str(error)) from error
    return TensorRef("", shape, dtype, HeldSource((path, start, stop)))


def _check(path: str, start: int, stop: int, wanted: str) -> None:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or (stop > start and status.st_size < stop):
        raise DamagedError("outside of a part file")
    if file_checksum(path, start, stop) != wanted:
        raise DamagedError("another content")
