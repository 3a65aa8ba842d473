"""A safetensors file at a URL: the header first, then the ranges of tensors that are asked for.

Small tensors that lie together are read together, since a request costs as long as some megabytes; what was read and
not asked for yet is kept, up to a bound for the whole process.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

from loratools.errors import ReadError
from loratools.io import storage
from loratools.io.header import MAX_LENGTH
from loratools.io.stores import State

HEAD = 256 << 10
"""Bytes of the first request: the whole header of nearly every adapter."""
GROUP = 4 << 20
"""Bytes that neighbouring tensors are read together up to; a larger one is read alone, and not kept."""
_KEPT = 32  # groups in memory, of all files


class _Group(NamedTuple):
    """Neighbouring tensors: from ``start`` to ``stop`` in the file of a URL in the state of ``tag``."""

    url: str
    tag: str
    start: int
    stop: int


class _Groups:
    """Groups that were read last; one that several threads want is read once."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Group, Future[bytearray]] = OrderedDict()
        self._turn = Lock()

    def of(self, group: _Group) -> bytearray:
        """A group's bytes.

        Raises:
            LoraError: It cannot be read.
        """
        with self._turn:
            found = self._kept.get(group)
            own = found is None
            if found is None:
                found = self._kept[group] = Future()
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
        if own:
            self._read(group, found)
        return found.result()

    def _read(self, group: _Group, goal: Future[bytearray]) -> None:
        try:
            goal.set_result(_read(group.url, group.start, group.stop))
        except BaseException as error:  # whoever waits for it has to hear of an interrupt, too
            goal.set_exception(error)
            with self._turn:
                self._kept.pop(group, None)


class RemoteFile:
    """A file at a URL, with the same views as a :class:`loratools.io.mapped.FileMap`; data is read when it is viewed.

    Pickled, it is the URL, size and groups: whoever unpickles it reads for itself.

    Attributes:
        path: The URL.
        size: In bytes.
        head: The first bytes.
    """

    __slots__ = ("_starts", "_stops", "_tag", "head", "path", "size")

    def __init__(self, path: str, said: State) -> None:
        """Read the file's first bytes.

        Args:
            path: The URL of a file that can be read in parts.
            said: What its store says of it.

        Raises:
            LoraError: It cannot be read.
        """
        self.path = path
        self.size = said.size
        self._tag = said.whole_tag
        self.head = _read(path, 0, min(HEAD, self.size))
        self._starts: list[int] = []
        self._stops: list[int] = []

    def header(self) -> bytearray:
        """The file's first bytes, the whole header of a safetensors file among them.

        Raises:
            LoraError: It cannot be read.
        """
        stop = min(8 + int.from_bytes(self.head[:8], "little"), 8 + MAX_LENGTH, self.size)
        if stop <= len(self.head):
            return self.head
        return self.head + _read(self.path, len(self.head), stop)

    def plan(self, extents: Iterable[tuple[int, int]]) -> None:
        """Say where tensors lie, (start, stop) in bytes, so that neighbours are read together."""
        for start, stop in sorted(extents):
            if self._stops and start == self._stops[-1] and stop - self._starts[-1] <= GROUP:
                self._stops[-1] = stop
            else:
                self._starts.append(start)
                self._stops.append(stop)

    def view(self, start: int, stop: int) -> memoryview:
        """The bytes from ``start`` to ``stop``, in memory of their own.

        Raises:
            LoraError: They cannot be read.
        """
        if stop <= len(self.head):
            return memoryview(self.head[start:stop])
        number = bisect_right(self._starts, start) - 1
        if number < 0 or stop > self._stops[number] or stop - start > GROUP:
            return memoryview(_read(self.path, start, stop))
        begin = self._starts[number]
        whole = _groups().of(_Group(self.path, self._tag, begin, self._stops[number]))
        return memoryview(whole[start - begin : stop - begin])

    def close(self) -> None:
        """Nothing is open."""

    def __reduce__(self) -> tuple[Callable[..., RemoteFile], tuple[object, ...]]:
        return _again, (self.path, self.size, self._tag, tuple(self._starts), tuple(self._stops))


@lru_cache(maxsize=64)  # each of its tensors may come by itself
def _again(path: str, size: int, tag: str, starts: tuple[int, ...], stops: tuple[int, ...]) -> RemoteFile:
    """The file that was pickled, perhaps in another process.

    Raises:
        ReadError: The file is gone, or is another than it was.
    """
    found = storage.tag(path)
    if found != tag:
        raise ReadError(
            f"the file is another now ({found} instead of {tag})",
            path=path,
            expected="The state was expected that it had when it was opened",
            todo="Keep the file as it is until the work is done",
        )
    file = RemoteFile.__new__(RemoteFile)
    file.path, file.size, file._tag, file.head = path, size, tag, bytearray()
    file._starts, file._stops = [*starts], [*stops]
    return file


@lru_cache(maxsize=1)
def _groups() -> _Groups:
    """The groups of this process."""
    return _Groups()


def _read(url: str, start: int, stop: int) -> bytearray:
    data = bytearray(stop - start)
    storage.read_at(url, start, data)
    return data
