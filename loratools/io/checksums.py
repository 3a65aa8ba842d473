"""A checksum that is quick enough to be taken of everything that is written: of torn, lost and swapped blocks.

It is no protection against somebody who changes data on purpose.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from loratools.io.regions import read_at

if TYPE_CHECKING:
    from loratools.io.regions import Buffer

_BLOCK = 4096  # bytes that are summed up
_AT_ONCE = 4 << 20  # bytes of a file that are read at a time: whole blocks


class Checksum:
    """The CRC-32 of the sums of 64-bit words over blocks of 4096 bytes, and of the bytes behind the last whole block.

    Summing is as quick as memory is, and the CRC is that of a 512th of the data.
    """

    def __init__(self) -> None:
        self._crc = 0
        self._size = 0

    def update(self, data: Buffer) -> None:
        """Take in more bytes; all but the last piece have whole blocks.

        Raises:
            ValueError: The piece before had none.
        """
        import numpy

        view = memoryview(data).cast("B")
        if self._size % _BLOCK:
            raise ValueError("only the last piece may end within a block")
        self._size += len(view)
        whole = len(view) - len(view) % _BLOCK
        if whole:
            words = numpy.frombuffer(view[:whole], dtype="<u8").reshape(-1, _BLOCK // 8)
            self._crc = zlib.crc32(words.sum(axis=1, dtype="<u8"), self._crc)
        self._crc = zlib.crc32(view[whole:], self._crc)

    @property
    def value(self) -> str:
        """The checksum as text: eight hexadecimal digits."""
        return f"{zlib.crc32(self._size.to_bytes(8, 'little'), self._crc):08x}"


def checksum(data: Buffer) -> str:
    """The checksum of bytes in memory."""
    found = Checksum()
    found.update(data)
    return found.value


def file_checksum(file: str | int, start: int, stop: int) -> str:
    """The checksum of the bytes ``start`` to ``stop`` of a file.

    Args:
        file: Its path, or a descriptor.
        start: Offset of the first byte.
        stop: Offset behind the last.

    Raises:
        MalformedFileError: The file is shorter.
        OSError: It cannot be read.
    """
    found = Checksum()
    buffer = bytearray(min(_AT_ONCE, stop - start))
    for at in range(start, stop, _AT_ONCE):
        part = memoryview(buffer)[: min(_AT_ONCE, stop - at)]
        read_at(file, at, part)
        found.update(part)
    return found.value
