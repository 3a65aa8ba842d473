"""numpy's ``.npz``: a zip archive of ``.npy`` members, read without numpy and without pickle.

Members are read when asked for, so that an archive of any size opens at once.
Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import ast
import math
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.errors import MalformedFileError, ReadError
from loratools.io.archive import open_archive, read_member
from loratools.io.json_text import brief
from loratools.io.mapped import TensorFile
from loratools.tensors import DTYPES, BytesSource, TensorRef, carried

if TYPE_CHECKING:
    import torch

MAGIC = b"\x93NUMPY"

# By version: how many bytes hold the header's length.
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}
_LONGEST_HEADER = 10_000  # characters; numpy's own limit, since Python's parser may run out of stack
_MOST_AXES = 64  # numpy's
_MOST_BYTES = 2**63
_NAMES = {row.numpy.lstrip("<"): row.name for row in DTYPES.values() if row.numpy} | {"b1": "BOOL"}


class _UnreadableError(ValueError):
    """Why one member cannot be read; collected over the archive before anything is raised."""


@dataclass(frozen=True, slots=True, eq=False)
class _MemberSource:
    """The data of one member.

    Attributes:
        archive: The open archive.
        member: The member's name in it.
        path: The archive's path, for messages.
        start: Where the data begins, in bytes from the start of the member.
        fortran: The shape of data stored in column order, or None for row order.
        dtype: The safetensors name of the dtype.
    """

    archive: zipfile.ZipFile
    member: str
    path: str
    start: int
    fortran: tuple[int, ...] | None
    dtype: str

    def raw(self) -> memoryview:
        """The bytes in row order; read from the file each time, and checked against the checksum."""
        if self.archive.fp is None:
            raise ReadError("the file was closed", path=self.path, todo="Load tensors before closing it")
        # Copied to memory of its own: aligned, and writable, without which torch warns.
        data = memoryview(
            bytearray(memoryview(read_member(self.archive, self.member, self.path))[self.start :])
        )
        return data if self.fortran is None else _row_order(data, self.fortran, self.dtype)

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The data as a tensor."""
        return BytesSource(self.raw()).torch(shape, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return carried(self.raw())


def read_npz(path: str, size: int) -> TensorFile:
    """Open an archive of arrays.

    Args:
        path: The file.
        size: Its size in bytes.

    Raises:
        MalformedFileError: A damaged archive, or members that are not arrays of numbers.
    """
    archive = open_archive(path)
    tensors: dict[str, TensorRef] = {}
    problems: dict[str, str] = {}
    try:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            try:
                tensors[name] = _member(archive, info, path)
            except _UnreadableError as error:
                problems[name] = str(error)
        if problems:
            share = f"{len(problems)} of {len(archive.infolist())} arrays"
            raise MalformedFileError(
                f"{share} cannot be read: {next(iter(problems.values()))}",
                path=path,
                keys=problems,
                expected="Arrays of numbers in numpy's format, little-endian, were expected",
                todo="Save the file again as safetensors",
            )
    except BaseException:
        archive.close()
        raise
    return TensorFile(path, "npz", tensors, {}, size, on_close=archive.close)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: str) -> TensorRef:
    name = info.filename.removesuffix(".npy")
    head = read_member(archive, info.filename, path, most=12 + _LONGEST_HEADER)
    fields, start = _npy_header(head)
    dtype = _dtype(fields["descr"])
    shape, fortran = fields["shape"], fields["fortran_order"]
    valid = isinstance(shape, tuple) and all(type(dim) is int and dim >= 0 for dim in shape)
    if not valid or len(shape) > _MOST_AXES or type(fortran) is not bool:
        raise _UnreadableError(f"its header gives shape {brief(shape)} and fortran_order {brief(fortran)}")
    needed = math.prod(shape) * DTYPES[dtype].bits // 8
    if needed != info.file_size - start or math.prod(filter(None, shape)) > _MOST_BYTES:
        raise _UnreadableError(
            f"it has {info.file_size - start:,} bytes of data, its shape {brief(shape)} takes {brief(needed)}"
        )
    source = _MemberSource(
        archive, info.filename, path, start, shape if fortran and len(shape) > 1 else None, dtype
    )
    return TensorRef(name, shape, dtype, source)


def _npy_header(head: bytes) -> tuple[dict[str, Any], int]:
    """The fields of a ``.npy`` header, and where the data begins."""
    width = _LENGTH_BYTES.get(head[6] if len(head) > 7 else 0)
    if not head.startswith(MAGIC) or width is None:
        raise _UnreadableError("it is not in numpy's format")
    start = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
    if start > len(head):
        raise _UnreadableError("its header is cut off or too long")
    try:
        fields = ast.literal_eval(
            head[8 + width : start].decode("utf-8" if head[6] == 3 else "latin-1").strip()
        )
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise _UnreadableError("its header is not a Python literal") from None
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise _UnreadableError("its header lacks descr, fortran_order or shape")
    return fields, start


def _dtype(descr: object) -> str:
    """The safetensors name for numpy's description of a dtype."""
    if isinstance(descr, str):
        if descr.lstrip("|<=>") in _NAMES:
            if descr[0] == ">" and descr[2:] != "1":
                raise _UnreadableError(f"dtype {descr} is big-endian")
            return _NAMES[descr.lstrip("|<=>")]
        if "O" in descr:
            raise _UnreadableError(
                "it holds Python objects, which only unpickling could read and which may run code"
            )
        if descr.lstrip("|<>") == "V2":
            raise _UnreadableError(
                "dtype V2 is two bytes without a meaning (bfloat16, saved where numpy lacks it)"
            )
    raise _UnreadableError(f"dtype {brief(descr)} has no place in a safetensors file")


def _row_order(data: memoryview, shape: tuple[int, ...], dtype: str) -> memoryview:
    import numpy

    array = numpy.frombuffer(data, DTYPES[dtype].numpy).reshape(shape, order="F")
    return numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8).data
