"""Zip archives, with every way in which one can be broken turned into our own error."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections import Counter

from loratools.errors import MalformedFileError
from loratools.io.mapped import damaged

_CHUNK = 1 << 20
_LOCAL_HEADER = 30  # bytes before a member's name
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MOST_RATIO = 1032  # what deflate can make of a byte: https://zlib.net/zlib_tech.html
# An adapter's zeros may be packed as tightly, but hardly a gigabyte of them: beyond it, factors that were trained.
_INFLATED = 1 << 30
_RATIO = 100
# What zipfile and zlib raise for damaged, encrypted and exotic archives.
_FAILURES = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    OverflowError,
    NotImplementedError,
)


def open_archive(path: str) -> zipfile.ZipFile:
    """Open a zip archive and read its directory.

    Raises:
        MalformedFileError: It is damaged, or two members have the same name (readers disagree which counts).
    """
    try:
        archive = zipfile.ZipFile(path)
    except _FAILURES as error:
        raise damaged(path, error, "the zip archive") from error
    try:
        _refuse_bombs(archive, path)
    except BaseException:
        archive.close()
        raise
    twice = [name for name, count in Counter(archive.namelist()).items() if count > 1]
    if twice:
        archive.close()
        raise MalformedFileError(
            "the zip archive holds members of the same name",
            path=path,
            keys=twice,
            expected="Each occurs once",
        )
    return archive


def _refuse_bombs(archive: zipfile.ZipFile, path: str) -> None:
    """Refuse an archive that becomes far more than it is, or that nobody's packer writes.

    Raises:
        MalformedFileError: Members lie over one another or outside the file, are compressed otherwise than by
            deflate, as numpy and zip programs do it, or inflate beyond measure.
    """
    size = os.path.getsize(path)
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        start, end = end, info.header_offset + _LOCAL_HEADER + info.compress_size
        if info.header_offset < start or end > size:
            raise _bomb(path, info.filename, "lies over another, or outside the file")
        if info.compress_type not in _PACKED:
            raise _bomb(
                path, info.filename, f"is compressed in a way that is not read ({info.compress_type})"
            )
        if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
            raise _bomb(path, info.filename, "is not compressed, and has two sizes")
        if info.file_size > _MOST_RATIO * (info.compress_size + 1):
            raise _bomb(
                path, info.filename, f"would inflate from {info.compress_size:,} to {info.file_size:,} bytes"
            )
    inflated = sum(info.file_size for info in archive.infolist())
    if inflated > max(_INFLATED, _RATIO * size):
        raise _bomb(path, "", f"would inflate from {size:,} to {inflated:,} bytes")


def _bomb(path: str, name: str, how: str) -> MalformedFileError:
    return MalformedFileError(
        f"{'a member of the' if name else 'the'} zip archive {how}",
        path=path,
        keys=[name] if name else (),
        expected="An archive as torch.save or numpy writes it was expected",
        todo="Do not use it, and get it again from where you trust it",
    )


def read_member(archive: zipfile.ZipFile, name: str, path: str, most: int = -1) -> bytes:
    """A member's bytes (all of them, or the first ``most``), checked against its checksum when read whole.

    Raises:
        MalformedFileError: The member is damaged, encrypted, or compressed in a way Python does not know.
    """
    try:
        with archive.open(name) as member:
            return member.read(most)
    except _FAILURES as error:
        raise damaged(path, error, f"member {name} of the zip archive") from error


def check_sums(archive: zipfile.ZipFile, path: str) -> None:
    """Compare every member with its checksum, unless the archive was written without checksums.

    torch does not look at them when it reads records, so that a damaged file would load as wrong numbers.
    ``torch.serialization.set_crc32_options(False)`` writes zeros for all of them, and its files are sound.

    Raises:
        MalformedFileError: A member is damaged or missing.
    """
    members = archive.infolist()
    if not any(info.CRC for info in members):
        return
    for info in members:
        try:
            with archive.open(info) as member:
                while member.read(_CHUNK):
                    pass
        except _FAILURES as error:
            raise damaged(path, error, f"member {info.filename} of the zip archive") from error
