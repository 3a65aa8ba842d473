"""Digests of a file's own data, computed beside the writing of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hashlib import _Hash

_AHEAD = 4 << 20  # bytes that may wait to be hashed while the next are made


class Digest(NamedTuple):
    """A SHA-256 over part of a file's data that is written into the file's own header.

    Attributes:
        digits: How many hexadecimal digits of it are kept.
        before: Bytes that it begins with, before the file's.
        start: Where the part begins, in bytes from the start of the data (the header is not counted).
        stop: Where it ends; None for the end of the data.
    """

    digits: int = 64
    before: bytes = b""
    start: int = 0
    stop: int | None = None

    @property
    def blank(self) -> str:
        """What stands in the header until the value is known."""
        return "0" * self.digits


class Running:
    """Digests that are being computed, chunk by chunk in the file's order.

    They have a thread of their own: hashing takes longer than writing, and neither keeps the interpreter meanwhile.
    Few chunks wait at any time, so that computed tensors do not pile up.
    """

    def __init__(self, digests: Mapping[str, Digest]) -> None:
        self._parts = {key: _Part(digest) for key, digest in digests.items()}
        self._waiting: list[memoryview] = []
        self._held = 0  # bytes that wait or are being hashed
        self._over = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="digests")

    def __enter__(self) -> Running:
        if self._parts:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last chunk; after an error nobody will ask for the values."""
        if self._parts:
            with self._changed:
                self._over = True
                self._changed.notify_all()
            self._thread.join()

    def update(self, chunk: memoryview) -> None:
        """Take the next bytes of the data, which must not change until they are hashed."""
        if self._parts:
            with self._changed:
                self._waiting.append(chunk)
                self._held += chunk.nbytes
                self._changed.notify_all()

    def keep_up(self) -> None:
        """Wait until little is left to be hashed."""
        if self._held > _AHEAD:
            with self._changed:
                self._changed.wait_for(lambda: self._held <= _AHEAD)

    def values(self) -> dict[str, str]:
        """The digits by key, once everything was taken and the thread has ended."""
        if self._error is not None:
            raise self._error
        return {key: part.value() for key, part in self._parts.items()}

    def _work(self) -> None:
        while chunks := self._next():
            try:
                for chunk in chunks:
                    for part in self._parts.values():
                        part.update(chunk)
            except Exception as error:  # raised again where the values are asked for
                self._error = self._error or error
            size = sum(chunk.nbytes for chunk in chunks)
            # Let go of them before the writer goes on to make more.
            del chunk, chunks
            with self._changed:
                self._held -= size
                self._changed.notify_all()

    def _next(self) -> list[memoryview]:
        """All chunks that wait; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._over)
            chunks, self._waiting = self._waiting, []
        return chunks


class _Part:
    """One digest, and how far into the data it has come."""

    def __init__(self, digest: Digest) -> None:
        import hashlib

        self._digest = digest
        self._sha: _Hash = hashlib.sha256(digest.before)
        self._position = 0

    def update(self, chunk: memoryview) -> None:
        """Take the next bytes of the data."""
        start, stop = self._digest.start - self._position, self._digest.stop
        self._position += chunk.nbytes
        last = chunk.nbytes if stop is None else stop - self._position + chunk.nbytes
        if last > 0 and start < chunk.nbytes:
            self._sha.update(chunk.cast("B")[max(start, 0) : last])

    def value(self) -> str:
        """The digits."""
        return self._sha.hexdigest()[: self._digest.digits]
