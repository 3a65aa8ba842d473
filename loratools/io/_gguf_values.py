"""The values of a GGUF header: read with their bounds checked, as text, and packed again; and what it is made of."""

from __future__ import annotations

import json
import struct
from typing import NamedTuple

from loratools.errors import LayoutError, MalformedFileError

MAGIC = b"GGUF"
VERSION = 3  # the one that is written
ALIGNMENT = 32  # in bytes, unless the header says otherwise
ALIGNMENT_KEY = "general.alignment"
MOST_AXES = 4

DTYPES_BY_NUMBER = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
"""Store dtypes by ggml's numbers of its types; all others are blocks of few bits."""
NUMBERS = {name: number for number, name in DTYPES_BY_NUMBER.items()}
FLOATING = ("F32", "F16", "BF16", "F64")

USUAL = {
    "adapter.lora.alpha": "float32",
    "adapter.alora.invocation_tokens": "array:uint32",
    "general.alignment": "uint32",
    "general.file_type": "uint32",
    "general.quantization_version": "uint32",
}
"""The types of the values that adapters have, where they are not strings."""
UNUSUAL = "gguf.types"
"""Our key for the types of the others, as JSON."""

Value = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]

# The numbers of the format's types, by what people call them; None for those that are not of one size.
TYPES: dict[str, tuple[int, str]] = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "string": (8, ""),
    "array": (9, ""),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
_NAMES = {number: name for name, (number, _) in TYPES.items()}
_ARRAY = "array:"


class Span(NamedTuple):
    """A value as it lies in the file.

    Attributes:
        type: "string", "uint32", …, or "array:" and the type of its elements.
        length: How many elements an array has; 1 for others.
        data: Its bytes; of strings with their lengths.
    """

    type: str
    length: int
    data: bytes

    def value(self) -> Value:
        """What the bytes mean."""
        kind = self.type.removeprefix(_ARRAY)
        found = _strings(self.data, self.length) if kind == "string" else _numbers(self.data, kind)
        return found if self.type.startswith(_ARRAY) else found[0]


class Reader:
    """A walk through a header, which never leaves the file.

    Attributes:
        place: How many bytes are behind.
        path: For messages.
    """

    def __init__(self, data: memoryview, path: str) -> None:
        self._data = data
        self.place = 0
        self.path = path

    def skip(self, count: int) -> memoryview:
        """The next bytes, which are behind then.

        Raises:
            MalformedFileError: The file has fewer.
        """
        if count > len(self._data) - self.place:
            raise MalformedFileError(
                f"the file is truncated: its header wants {count:,} bytes at {self.place:,} of {len(self._data):,}",
                path=self.path,
                expected="A download that broke off, or a damaged file",
                todo="Download the file again",
            )
        self.place += count
        return self._data[self.place - count : self.place]

    def number(self, code: str) -> int:
        """The next number, by its code of ``struct``."""
        return int(struct.unpack("<" + code, self.skip(struct.calcsize("<" + code)))[0])

    def string(self) -> str:
        """The next string.

        Raises:
            MalformedFileError: It is not UTF-8.
        """
        data = bytes(self.skip(self.number("Q")))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise MalformedFileError(
                f"the header has a name that is no text: {data[:20]!r}",
                path=self.path,
                todo="The file is damaged; download it again",
            ) from None

    def room(self, count: int, least: int, what: str) -> None:
        """Refuse a count of entries that the rest of the file has no room for.

        Raises:
            MalformedFileError: Each takes at least ``least`` bytes.
        """
        if count * least > len(self._data) - self.place:
            raise MalformedFileError(
                f"the header announces {count:,} {what}, for which the file of {len(self._data):,} bytes has no room",
                path=self.path,
                todo="The file is damaged; download it again",
            )

    def value(self, key: str) -> Span:
        """The next value, its type before it.

        Raises:
            MalformedFileError: Its type is unknown, or it is an array of arrays.
        """
        kind = self._type(key)
        if kind != "array":
            start = self.place
            self._pass(kind, 1)
            return Span(kind, 1, bytes(self._data[start : self.place]))
        kind, count = self._type(key), self.number("Q")
        if kind == "array":
            raise MalformedFileError(
                f"{key} is an array of arrays, which llama.cpp does not read", path=self.path
            )
        start = self.place
        self._pass(kind, count)
        return Span(_ARRAY + kind, count, bytes(self._data[start : self.place]))

    def _type(self, key: str) -> str:
        number = self.number("I")
        if number not in _NAMES:
            raise MalformedFileError(
                f"{key} has type {number}",
                path=self.path,
                expected=f"Types 0 to {max(_NAMES)} are known",
                todo="The file is damaged; download it again",
            )
        return _NAMES[number]

    def _pass(self, kind: str, count: int) -> None:
        if kind != "string":
            self.skip(count * struct.calcsize("<" + TYPES[kind][1]))
            return
        self.room(count, struct.calcsize("<Q"), "strings")
        for _ in range(count):
            self.skip(self.number("Q"))


def _strings(data: bytes, count: int) -> list[str]:
    found: list[str] = []
    place = 0
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", data, place)
        found.append(data[place + 8 : place + 8 + length].decode("utf-8", "replace"))
        place += 8 + length
    return found


def _numbers(data: bytes, kind: str) -> list[int] | list[float] | list[bool]:
    code = TYPES[kind][1]
    return list(struct.unpack(f"<{len(data) // struct.calcsize('<' + code)}{code}", data))


def text_of(value: Value) -> str:
    """A value as metadata has it: strings as they are, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def packed_string(text: str) -> bytes:
    """A string with its length before it."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def packed_value(key: str, text: str, kind: str) -> bytes:
    """A value with its type before it, from what ``text_of`` makes of it.

    Args:
        key: For the message.
        text: The value.
        kind: As ``Span.type`` has it.

    Raises:
        LayoutError: The text is no value of this type.
    """
    inner = kind.removeprefix(_ARRAY)
    try:
        value = text if kind == "string" else json.loads(text)
        values = value if kind.startswith(_ARRAY) else [value]
        data = b"".join(
            packed_string(each) if inner == "string" else struct.pack("<" + TYPES[inner][1], each)
            for each in values
        )
    except (ValueError, TypeError, KeyError, AttributeError, struct.error, OverflowError):
        raise LayoutError(
            f"the metadata's {key} is {text!r}", expected=f"A value of type {kind} was expected"
        ) from None
    number = struct.pack("<I", TYPES[inner][0])
    if not kind.startswith(_ARRAY):
        return number + data
    return struct.pack("<I", TYPES["array"][0]) + number + struct.pack("<Q", len(values)) + data
