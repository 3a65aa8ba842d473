"""The checksums of a zip archive of torch.save whose records are rewritten where they lie.

A record's CRC-32 stands up to three times: in its local header, in the data descriptor behind its data (torch writes
one, and zeros before the data), and in the central directory. Format: PKWARE's APPNOTE.TXT, sections 4.3 and 4.4.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from loratools.errors import MalformedFileError
from loratools.io.archive import open_archive
from loratools.io.regions import read_at, write_at

_LOCAL = b"PK\x03\x04"
_DESCRIPTOR = b"PK\x07\x08"
_CENTRAL = b"PK\x01\x02"
_LOCAL_SIZE = 30
_CENTRAL_SIZE = 46
_BEHIND = 1 << 3  # the flag of a record with a data descriptor
_PIECE = 1 << 20


class _Record(NamedTuple):
    """One member of the archive: offsets in the file, and its checksum until now."""

    name: str
    header: int
    central: int
    size: int
    crc: int
    described: bool


class ArchiveSums:
    """What has to be known of an archive's records before some of their bytes change.

    Attributes:
        records: In the file's order.
        summed: Whether it was written with checksums; one without keeps its zeros.
    """

    def __init__(self, path: str) -> None:
        """Read the archive's directory.

        Raises:
            MalformedFileError: It is damaged.
        """
        self._path = path
        with open_archive(path) as archive:
            infos = archive.infolist()
            centrals = _centrals(path, archive.start_dir, len(infos))
        self.summed = any(info.CRC for info in infos)
        self.records = sorted(
            (
                _Record(
                    info.filename,
                    info.header_offset,
                    central,
                    info.compress_size,
                    info.CRC,
                    bool(info.flag_bits & _BEHIND),
                )
                for info, central in zip(infos, centrals, strict=True)
            ),
            key=lambda record: record.header,
        )

    def renew(self, target: int, written: Mapping[tuple[int, int], int]) -> None:
        """Correct the checksums in a copy of the archive.

        Args:
            target: The copy's descriptor, whose data is complete.
            written: The CRC-32 of each range (start, stop) that was written anew.

        Raises:
            MalformedFileError: A range lies in no record, or a checksum is not where it belongs.
        """
        if not self.summed:
            return
        for record, data in self._touched(target, written):
            crc = written.get((data, data + record.size))
            if crc is None:  # only some of its bytes are new
                crc = _crc_of(target, data, record.size)
            value = crc.to_bytes(4, "little")
            for place in self._places(target, record, data):
                write_at(target, place, value)

    def _touched(self, target: int, ranges: Iterable[tuple[int, int]]) -> list[tuple[_Record, int]]:
        """The records that hold the ranges, each with the offset of its data."""
        headers = [record.header for record in self.records]
        found: dict[int, int] = {}
        for start, stop in ranges:
            place = max(bisect_right(headers, start) - 1, 0)
            data = found.setdefault(place, self._data_of(target, place))
            if not data <= start <= stop <= data + self.records[place].size:
                raise MalformedFileError(
                    f"bytes {start:,} to {stop:,} lie in no record of the archive",
                    path=self._path,
                    expected="Every tensor of torch.save lies in one record",
                )
        return [(self.records[place], data) for place, data in found.items()]

    def _data_of(self, target: int, place: int) -> int:
        """Where a record's data begins: the fields of its local header need not be as long as the directory's."""
        record = self.records[place]
        local = _bytes_at(target, record.header, _LOCAL_SIZE)
        if not local.startswith(_LOCAL):
            raise self._lost(record)
        lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        return record.header + _LOCAL_SIZE + lengths

    def _places(self, target: int, record: _Record, data: int) -> list[int]:
        """Where the checksum stands, checked to be there."""
        old = record.crc.to_bytes(4, "little")
        places = [record.central + 16]
        if record.described:
            behind = data + record.size
            signed = _bytes_at(target, behind, 4) == _DESCRIPTOR
            places.append(behind + 4 * signed)
        if not record.described or _bytes_at(target, record.header + 14, 4) == old:
            places.append(record.header + 14)
        if any(_bytes_at(target, place, 4) != old for place in places):
            raise self._lost(record)
        return places

    def _lost(self, record: _Record) -> MalformedFileError:
        return MalformedFileError(
            f"the zip archive is damaged: the checksum of {record.name} is not where it belongs",
            path=self._path,
            expected="Header, data descriptor and directory were expected to agree",
            todo="Download the file again",
        )


def _centrals(path: str, start: int, count: int) -> list[int]:
    """The offsets of the directory's entries, in its order."""
    found = []
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        for _ in range(count):
            entry = _bytes_at(descriptor, start, _CENTRAL_SIZE)
            if not entry.startswith(_CENTRAL):
                raise MalformedFileError("the zip archive is damaged: its directory has gaps", path=path)
            found.append(start)
            start += _CENTRAL_SIZE + sum(int.from_bytes(entry[at : at + 2], "little") for at in (28, 30, 32))
    finally:
        os.close(descriptor)
    return found


def _crc_of(file: int, start: int, size: int) -> int:
    buffer = memoryview(bytearray(min(_PIECE, size)))
    crc = 0
    for at in range(start, start + size, _PIECE):
        part = buffer[: min(_PIECE, start + size - at)]
        read_at(file, at, part)
        crc = zlib.crc32(part, crc)
    return crc


def _bytes_at(file: int, start: int, size: int) -> bytes:
    found = bytearray(size)
    read_at(file, start, found)
    return bytes(found)
