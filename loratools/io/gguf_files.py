"""llama.cpp's GGUF: a typed header of keys and values, then tensors, aligned; their data is read on demand.

Numbers are little-endian here; files for big-endian machines are refused by name. Values of the header become text:
strings as they are, others as JSON, their types beside them where they are not the usual ones, so that the same header
is written again. Quantised tensors are float32 to whoever asks: the ``gguf`` package computes them on loading,
and they are copied as they are where nothing has changed them.
Source: ggml ``docs/gguf.md``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from loratools.errors import MalformedFileError, ReadError
from loratools.io._gguf_values import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    DTYPES_BY_NUMBER,
    MAGIC,
    MOST_AXES,
    UNUSUAL,
    USUAL,
    Reader,
    text_of,
)
from loratools.io.mapped import FileMap, MappedSource, TensorFile
from loratools.tensors import BytesSource, TensorRef, nbytes

if TYPE_CHECKING:
    import torch

    from loratools.io._gguf_values import Span

__all__ = ["QuantisedSource", "read_gguf"]

_READ = (2, 3)
# The least that an entry of either kind takes, in bytes.
_LEAST_VALUE, _LEAST_TENSOR = 13, 24
# Arrays of a model's header (its vocabulary) are told of, not kept, where they are longer.
_LONGEST_KEPT = 64
_LONGEST_ARRAY = 1_000_000  # of an adapter's, whose arrays are kept


class QuantisedSource:
    """A tensor in blocks of few bits, from ``start`` on in a mapped file: float32 to whoever loads it.

    Attributes:
        file: The map.
        start: Where its bytes begin.
        number: ggml's number of its type.
        shape: Of the tensor; the last axis is what is divided into blocks.
    """

    __slots__ = ("file", "number", "shape", "start")

    def __init__(self, file: FileMap, start: int, number: int, shape: tuple[int, ...]) -> None:
        self.file = file
        self.start = start
        self.number = number
        self.shape = shape

    def stored(self) -> memoryview:
        """The blocks as they lie in the file.

        Raises:
            ReadError: The package that knows their sizes is not installed.
            MalformedFileError: No such type, or the file ends before them.
        """
        block, size = _block_of(self.number, self.file.path)
        if not self.shape or self.shape[-1] % block:
            raise MalformedFileError(
                f"a tensor of shape {list(self.shape)} does not fill whole blocks of {block}",
                path=self.file.path,
                todo="The file is damaged; download it again",
            )
        stop = self.start + math.prod(self.shape) // block * size
        data = self.file.view(self.start, stop)
        if data.nbytes != stop - self.start:
            raise _truncated(self.file.path, f"its data ends {stop - self.start - data.nbytes:,} bytes early")
        return data

    def raw(self) -> memoryview:
        """The bytes of the values as float32."""
        import numpy
        from gguf import GGMLQuantizationType, dequantize

        data = numpy.frombuffer(self.stored(), numpy.uint8)
        if not data.size:
            return data.data
        rows = data.reshape(*self.shape[:-1], -1)
        values = dequantize(rows, GGMLQuantizationType(self.number)).astype("<f4", copy=False)
        return numpy.ascontiguousarray(values).reshape(-1).view(numpy.uint8).data

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The values as float32."""
        return BytesSource(bytearray(self.raw())).torch(shape, dtype)


class _Entry(NamedTuple):
    """A tensor as the header has it: name, shape, ggml's type, and where it begins behind the header."""

    name: str
    shape: tuple[int, ...]
    number: int
    offset: int


def read_gguf(path: str, size: int) -> TensorFile:
    """Open a GGUF file; data is read on demand.

    Args:
        path: The file.
        size: Its size in bytes.

    Raises:
        MalformedFileError: It is damaged, of a version that is not read, or for big-endian machines.
        OSError: It cannot be opened.
    """
    mapped = FileMap(path)
    try:
        with mapped.view(0, size) as data:
            values, entries, start = _header(Reader(data, path))
        tensors = {entry.name: _ref(entry, mapped, start, size) for entry in entries}
        if len(tensors) != len(entries):
            raise MalformedFileError(
                "two tensors have one name", path=path, todo="The file is damaged; get it again"
            )
        _refuse_overlaps(entries, path)
    except BaseException:
        mapped.close()
        raise
    return TensorFile(path, "gguf", tensors, _metadata(values, path), size, on_close=mapped.close)


def _header(reader: Reader) -> tuple[dict[str, Span], list[_Entry], int]:
    """All values, all tensors, and where the data begins."""
    reader.skip(len(MAGIC))
    version = reader.number("I")
    if version & 0xFFFF == 0 and version:
        raise MalformedFileError(
            "a GGUF file for big-endian machines",
            path=reader.path,
            expected="Little-endian numbers were expected",
            todo="Convert the adapter again without --bigendian",
        )
    if version not in _READ:
        raise MalformedFileError(
            f"a GGUF file of version {version}",
            path=reader.path,
            expected=f"Versions {' and '.join(map(str, _READ))} are read",
            todo="Convert the adapter again with a newer llama.cpp" if version < _READ[0] else "",
        )
    tensors, count = reader.number("Q"), reader.number("Q")
    reader.room(tensors, _LEAST_TENSOR, "tensors")
    reader.room(count, _LEAST_VALUE, "values")
    values: dict[str, Span] = {}
    for _ in range(count):
        key = reader.string()
        if key in values:
            raise MalformedFileError(f"{key} is there twice", path=reader.path)
        values[key] = reader.value(key)
    entries = [_entry(reader) for _ in range(tensors)]
    alignment = values[ALIGNMENT_KEY].value() if ALIGNMENT_KEY in values else ALIGNMENT
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise MalformedFileError(
            f"{ALIGNMENT_KEY} is {alignment!r}", path=reader.path, expected="A power of two was expected"
        )
    return values, entries, reader.place + -reader.place % alignment


def _entry(reader: Reader) -> _Entry:
    name = reader.string()
    axes = reader.number("I")
    if axes > MOST_AXES:
        raise MalformedFileError(
            f"{name} has {axes} axes",
            path=reader.path,
            expected=f"At most {MOST_AXES} were expected",
            todo="The file is damaged; download it again",
        )
    # ggml counts from the axis that runs fastest.
    shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
    return _Entry(name, shape, reader.number("I"), reader.number("Q"))


def _ref(entry: _Entry, mapped: FileMap, start: int, size: int) -> TensorRef:
    begin = start + entry.offset
    dtype = DTYPES_BY_NUMBER.get(entry.number)
    stop = begin + _least(entry)
    if stop > size:
        raise _truncated(mapped.path, f"{entry.name} would end at byte {stop:,} of {size:,}")
    if dtype is None:
        source = QuantisedSource(mapped, begin, entry.number, entry.shape)
        return TensorRef(entry.name, entry.shape, "F32", source)
    return TensorRef(entry.name, entry.shape, dtype, MappedSource(mapped, begin, stop))


def _least(entry: _Entry) -> int:
    """The bytes that a tensor takes; of a quantised one at least, since no type has less than a bit for a value."""
    dtype = DTYPES_BY_NUMBER.get(entry.number)
    return nbytes(entry.shape, dtype) if dtype is not None else max(1, math.prod(entry.shape) // 8)


def _refuse_overlaps(entries: Iterable[_Entry], path: str) -> None:
    """Refuse tensors that lie over each other: a small file would become any number of large ones."""
    end, before = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if not math.prod(entry.shape):
            continue
        if entry.offset < end:
            raise MalformedFileError(
                f"its data begins at {entry.offset:,}, within that of {before}",
                path=path,
                keys=[entry.name],
                expected="Tensors follow each other",
                todo="The file is damaged; download it again",
            )
        end, before = entry.offset + _least(entry), entry.name


def _truncated(path: str, how: str) -> MalformedFileError:
    return MalformedFileError(
        f"the file is truncated: {how}",
        path=path,
        expected="A download that broke off, or a copy",
        todo="Download the file again",
    )


def _metadata(values: Mapping[str, Span], path: str) -> dict[str, str]:
    """The values as text, and the types of those that have not the usual ones."""
    kept: dict[str, str] = {}
    unusual: dict[str, str] = {}
    adapter = "general.type" in values and values["general.type"].value() == "adapter"
    for key, span in values.items():
        if span.length > _LONGEST_ARRAY and adapter:
            raise MalformedFileError(
                f"{key} has {span.length:,} values",
                path=path,
                expected=f"At most {_LONGEST_ARRAY:,} were expected",
            )
        if span.length > _LONGEST_KEPT and not adapter:
            kept[key] = f"[{span.length:,} values]"
            continue
        kept[key] = text_of(span.value())
        if span.type != USUAL.get(key, "string"):
            unusual[key] = span.type
    if unusual and adapter:
        kept[UNUSUAL] = json.dumps(unusual)
    return kept


def _block_of(number: int, path: str) -> tuple[int, int]:
    """How many values a block of a quantised type holds, and how many bytes it takes."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise ReadError(
            "its tensors are quantised, and the gguf package is not installed",
            path=path,
            todo="Install it: pip install 'loratools[gguf]'",
        ) from None
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    except (ValueError, KeyError):
        raise MalformedFileError(
            f"a tensor has type {number}, which the gguf package does not know",
            path=path,
            todo="Install a newer one: pip install -U gguf",
        ) from None
    return int(block), int(size)
