"""A file of tensors, and the map behind it: data is mapped into memory, not read."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loratools.errors import MalformedFileError, ReadError
from loratools.io import unchanged
from loratools.tensors import DTYPES, BytesSource, TensorRef

if TYPE_CHECKING:
    import torch

    from loratools.io.ranged import RemoteFile


_TINY = 8
_PREAD: Callable[[int, int, int], bytes] | None = getattr(os, "pread", None)  # not on Windows


class FileMap:
    """A file mapped into memory, whose bytes are copied only where they are written to.

    The map is private (copy-on-write): torch and numpy get memory they may write to, so that torch.frombuffer
    does not warn, while whatever is written stays in this process and never reaches the file. A system that
    refuses a private map larger than its memory gets a read-only one, with torch's single warning.

    A file that another program has changed since it was opened is refused whenever data of it is asked for. One that
    is shortened between that and the touching of its pages ends the process (SIGBUS), as a kill does: nothing has an
    output's name then. A file that was replaced under its name stays mapped as it was.

    Pickled, it is the file's path and size: whoever unpickles it maps the file anew.
    """

    __slots__ = ("_file", "_map", "_state", "path")

    def __init__(self, path: str) -> None:
        """Map a file that is not empty.

        Raises:
            OSError: It cannot be opened or mapped.
        """
        self.path = path
        self._map: mmap.mmap | None
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - stays open as long as the map
        try:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._state = unchanged.state_of(os.fstat(self._file.fileno()))

    def view(self, start: int, stop: int) -> memoryview:
        """The bytes from ``start`` to ``stop``, without a copy; they keep the map alive.

        Raises:
            ReadError: The file was closed, has changed since it was opened, or cannot be read.
        """
        if self._map is None:
            raise ReadError("the file was closed", path=self.path, todo="Load tensors before closing it")
        if stop - start <= _TINY and _PREAD is not None:
            # An alpha: reading it costs a third of mapping the page that it lies in.
            data = bytearray(self._read(_PREAD, start, stop))
            if len(data) == stop - start:
                return memoryview(data)
        self._refuse_changed()
        return memoryview(self._map)[start:stop]

    def _read(self, pread: Callable[[int, int, int], bytes], start: int, stop: int) -> bytes:
        try:
            return pread(self._file.fileno(), stop - start, start)
        except OSError as error:
            raise ReadError(
                f"cannot be read: {error.strerror or error}",
                path=self.path,
                todo="Check the disk, or copy the file",
            ) from error

    def _refuse_changed(self) -> None:
        """Refuse a file that is not as it was when it was opened: of one that is shorter, pages are missing."""
        how = unchanged.difference(self._state, unchanged.state_of(os.fstat(self._file.fileno())))
        if how:
            raise unchanged.changed(self.path, how)

    def __reduce__(self) -> tuple[Callable[[str, int], FileMap], tuple[str, int]]:
        return _mapped_again, (os.path.abspath(self.path), self.view(0, sys.maxsize).nbytes)

    def __del__(self) -> None:
        # Whoever lets go of a lazily read file has nothing left to close it by.
        if file := getattr(self, "_file", None):
            file.close()

    def close(self) -> None:
        """Release the map, at once where no view is out, else together with the last view.

        Views include the tensors and arrays made from them: those stay valid. Windows cannot replace the file
        before the last one is gone.
        """
        mapped, self._map = self._map, None
        self._file.close()
        if mapped is not None:
            with suppress(BufferError):  # where views are out, they alone keep the map alive now
                mapped.close()


def _mapped_again(path: str, size: int) -> FileMap:
    """The map of a file that was pickled, perhaps in another process.

    Raises:
        ReadError: The file is gone, or of another size than it was.
    """
    try:
        mapped = FileMap(path)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ReadError(
            f"cannot be read again: {error}", path=path, todo="Keep the file until the work is done"
        ) from error
    found = mapped.view(0, sys.maxsize).nbytes
    if found != size:
        mapped.close()
        raise ReadError(
            f"the file has {found:,} bytes now",
            path=path,
            expected=f"The {size:,} bytes were expected that it had when it was opened",
            todo="Keep the file as it is until the work is done",
        )
    return mapped


class MappedSource:
    """Data that lies in a mapped file, or in one elsewhere, from ``start`` to ``stop`` (bytes).

    It takes its view of the map only when asked, so that a file of which nothing is in use can be closed. It can be
    pickled: the file's path and the two offsets, not the data.
    """

    __slots__ = ("file", "start", "stop")

    def __init__(self, file: FileMap | RemoteFile, start: int, stop: int) -> None:
        self.file = file
        self.start = start
        self.stop = stop

    def raw(self) -> memoryview:
        """The bytes in the map."""
        return self.file.view(self.start, self.stop)

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """A tensor over the map; a copy where the data lies unaligned, which torch does not expect."""
        data = self.raw()
        if self.start % max(1, DTYPES[dtype].bits // 8):
            data = memoryview(bytearray(data))
        return BytesSource(data).torch(shape, dtype)


def _nothing() -> None:
    """What closing does to a file that holds nothing open."""


class TensorFile:
    """An open file: its tensors by key in the file's order, and what else it holds.

    Attributes:
        path: Where it was read from.
        container: "safetensors", "pickle", "npz" or "gguf".
        tensors: The tensors by key; their data is read on ``load()``.
        metadata: The string metadata of a safetensors file; of a GGUF file its values as text.
        size: The file's size in bytes.
        objects: What a pickle holds besides tensors, by key: step counts, configurations, names.
        wrapper: The key of the dict that held a pickle's tensors ("state_dict", …), or empty.
    """

    def __init__(
        self,
        path: str,
        container: str,
        tensors: dict[str, TensorRef],
        metadata: dict[str, str],
        size: int,
        objects: dict[str, Any] | None = None,
        wrapper: str = "",
        on_close: Callable[[], None] = _nothing,
    ) -> None:
        self.path = path
        self.container = container
        self.tensors = tensors
        self.metadata = metadata
        self.size = size
        self.objects = objects or {}
        self.wrapper = wrapper
        self.on_close = on_close

    def close(self) -> None:
        """Let go of the file. Tensors that were loaded stay valid; the others can no longer be loaded.

        A pickle's tensors share storages that were mapped when it was opened, and keep them.
        """
        self.on_close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def damaged(path: str | os.PathLike[str], error: Exception, what: str) -> MalformedFileError:
    """The error for a container that its library could not read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return MalformedFileError(
        f"{what} is damaged: {reason}",
        path=path,
        expected="The file is truncated (a download that broke off) or was changed after it was saved",
        todo="Download the file again",
    )
