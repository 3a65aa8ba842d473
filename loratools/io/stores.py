"""What every place that URLs point to can be asked; which there are, :mod:`loratools.io.storage` knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol


class State(NamedTuple):
    """What a store knows of a name.

    Attributes:
        size: Of a file, in bytes; 0 of a folder; -1 of a file whose server does not say.
        folder: Whether it is a folder.
        tag: What changes with a file's content: the store's hash of it, or its time; empty where neither is told.
        ranged: Whether parts of the file can be read.
        sha256: Of the file's content, where the store tells it; else empty.
    """

    size: int
    folder: bool
    tag: str = ""
    ranged: bool = True
    sha256: str = ""

    @property
    def whole_tag(self) -> str:
        """What tells the content from another, as far as the store does."""
        return f"{self.size} {self.tag}"


class Store(Protocol):
    """A place that URLs point to."""

    def state(self, url: str) -> State | None:
        """What it knows of a name; None where there is nothing."""

    def names(self, url: str) -> list[str]:
        """The names in a folder, in any order."""

    def tree(self, url: str) -> Mapping[str, int]:
        """The sizes in bytes of all files below a folder, by path relative to it."""

    def read(self, url: str, start: int, stop: int) -> bytes | memoryview:
        """The bytes of a file from ``start`` to ``stop``, or fewer where it ends before."""

    def fetched(self, url: str) -> str:
        """The path of a whole copy of a file on this machine, which lasts as long as the process."""

    def pinned(self, url: str) -> str:
        """A URL of the same that goes on meaning what it means now, where the store has such."""
