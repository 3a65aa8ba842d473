"""Zip archives, with every way in which one can be broken turned into our own error."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections import Counter

from loratools.errors import MalformedFileError
from loratools.io.mapped import damaged

_CHUNK = 1 << 20
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
