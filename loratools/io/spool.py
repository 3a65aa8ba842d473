"""A place on the disk for tensors that are computed now and written later: nothing of them stays in memory."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from loratools.errors import ReadError, ShapeError, WriteError
from loratools.io.regions import read_at, write_at
from loratools.tensors import DTYPES, TensorRef, carried, dtype_of, nbytes, torch_bytes

if TYPE_CHECKING:
    import torch


class SpooledSource:
    """Data that lies in a spool, from ``start`` to ``stop`` (bytes); every look reads it anew.

    Pickled, it is the data: nobody else can open a file without a name.
    """

    __slots__ = ("spool", "start", "stop")

    def __init__(self, spool: Spool, start: int, stop: int) -> None:
        self.spool = spool
        self.start = start
        self.stop = stop

    def raw(self) -> memoryview:
        """The bytes, in memory of their own."""
        buffer = memoryview(bytearray(self.stop - self.start))
        self.spool.read(self.start, buffer)
        return buffer

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The tensor, in memory of its own."""
        import torch

        kind: torch.dtype = getattr(torch, DTYPES[dtype].torch)
        data = torch.empty(self.stop - self.start, dtype=torch.uint8)
        if data.numel():
            self.spool.read(self.start, data.numpy().data)
        return data.view(kind).reshape(shape)

    def part(self, start: int, stop: int) -> SpooledSource:
        """The bytes from ``start`` to ``stop`` of these."""
        return SpooledSource(self.spool, self.start + start, self.start + stop)

    def __reduce__(self) -> tuple[Any, ...]:
        return carried(self.raw())


class Spool:
    """A nameless temporary file that tensors are put in, in any thread, and read from in any order.

    To be used in a ``with``; the file is gone behind it, or when the process ends, whatever ends it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Choose the folder: that of the output, so that what fits into one fits on the same disk."""
        self.folder = os.fspath(folder)
        self._file: IO[bytes] | None = None
        self._size = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Spool:
        import tempfile

        try:
            # It has no name on Linux, loses it at once on other POSIX systems, and on Windows when it is closed.
            self._file = tempfile.TemporaryFile(dir=self.folder, prefix=".loratools-")
        except OSError as error:
            raise self._refused(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    @property
    def size(self) -> int:
        """Bytes that were put."""
        return self._size

    def put(self, tensor: torch.Tensor, name: str = "") -> TensorRef:
        """Write a tensor of any device to the disk.

        Args:
            tensor: In the dtype in which it comes back.
            name: Of the reference.

        Returns:
            A reference that reads it on ``load()``, as long as the spool is open.

        Raises:
            MalformedFileError: The format has no name for its dtype.
            WriteError: The disk is full, or refuses.
        """
        cpu = tensor.detach().cpu()
        dtype = dtype_of(cpu)
        data = torch_bytes(cpu)
        with self._lock:
            start, self._size = self._size, self._size + data.nbytes
        try:
            write_at(self._descriptor(), start, data)
        except OSError as error:
            if isinstance(error, ReadError):
                raise
            raise self._refused(error) from error
        return TensorRef(name, tuple(cpu.shape), dtype, SpooledSource(self, start, start + data.nbytes))

    def head(self, ref: TensorRef, rows: int) -> TensorRef:
        """The first rows of a tensor that was put, (rows, …); the others are never read.

        Args:
            ref: What :meth:`put` gave.
            rows: A count.

        Raises:
            ShapeError: It has fewer rows, is transposed, or lies elsewhere.
        """
        source = ref.source
        if (
            not isinstance(source, SpooledSource)
            or ref.transposed
            or not ref.shape
            or not 0 <= rows <= ref.shape[0]
        ):
            raise ShapeError(
                f"{ref.name or 'a tensor'} of shape {list(ref.shape)} has no {rows} first rows in the spool",
                expected="A tensor as it was put, with as many rows or more",
            )
        shape = (rows, *ref.shape[1:])
        return ref._replace(shape=shape, source=source.part(0, nbytes(shape, ref.dtype)))

    def read(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from ``start`` on.

        Raises:
            ReadError: The spool is closed.
        """
        read_at(self._descriptor(), start, buffer, path=self.folder)

    def _descriptor(self) -> int:
        if self._file is None:
            raise ReadError(
                "the temporary file was closed",
                path=self.folder,
                expected="Its tensors can be put and loaded inside its `with` alone",
            )
        return self._file.fileno()

    def _refused(self, error: OSError) -> WriteError:
        return WriteError(
            f"a temporary file cannot be written: {error.strerror or error}",
            path=self.folder,
            expected="It takes about as much room as the output and is gone afterwards",
            todo="Make room, or choose another folder for the output",
        )
