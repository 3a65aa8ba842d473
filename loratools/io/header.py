"""The header of a safetensors file, read and written with the standard library alone.

A file is eight bytes (the header's length, little-endian), the header (JSON), and the data without holes.
Format: https://huggingface.co/docs/safetensors (section "Format").
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from loratools.errors import LayoutError, MalformedFileError
from loratools.io._entries import AGAIN, Entry, check_cover, read_entries
from loratools.tensors import nbytes

MAX_LENGTH = 100_000_000
"""Longest header in bytes that the safetensors package reads, and so the longest that we read or write."""

_METADATA = "__metadata__"

# The package sorts by its enumeration of dtypes, last one first, which is alignment and then age.
_RANKS = {
    dtype: rank
    for rank, dtype in enumerate(
        (
            *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
            *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8"),
            *("F6_E3M2", "F6_E2M3", "F4", "BOOL"),
        )
    )
}

Spec = tuple[str, str, tuple[int, ...]]
"""A tensor to be written: its name, the safetensors name of its dtype, its shape."""


class Header(NamedTuple):
    """A header that has been checked: its entries cover the data exactly.

    Attributes:
        entries: The tensors by name, in the order of the JSON.
        metadata: The file's string metadata.
        data_start: Where the data begins, in bytes from the start of the file.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


class _DuplicateKeyError(ValueError):
    """A JSON object that has a key twice."""


def parse(data: memoryview | bytes, size: int, path: str) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        data: The file's first bytes, at least the whole header; usually the mapped file.
        size: The whole file's size in bytes.
        path: The file's name, for messages.

    Raises:
        MalformedFileError: The header, or the data's length, is not what the format defines.
    """
    length = _header_length(data, size, path)
    text = _decode(bytes(data[8 : 8 + length]), path)
    table = _load(text, path)
    metadata = _metadata(table.pop(_METADATA, None), path)
    entries = read_entries(table, path)
    if "\\u" in text:  # the only way past the UTF-8 decoder for half of a surrogate pair
        _refuse_surrogates([*entries, *metadata, *metadata.values()], path)
    check_cover(entries, size - 8 - length, path)
    return Header(entries, metadata, 8 + length)


def build(tensors: Sequence[Spec], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds ``tensors`` in the order given: length and header.

    The bytes are those that the safetensors package writes, padding included. Metadata keeps its order.

    Raises:
        LayoutError: Names that occur twice or cannot be written, metadata that is not text or too long.
        MalformedFileError: A sub-byte tensor that does not fill whole bytes.
    """
    _check_names([name for name, _, _ in tensors], metadata)
    table: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    stop = 0
    for name, dtype, shape in tensors:
        start, stop = stop, stop + nbytes(shape, dtype)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_LENGTH:
        raise LayoutError(
            f"the header would take {len(text):,} bytes",
            expected=f"A safetensors header holds at most {MAX_LENGTH:,} bytes",
            todo="Write less metadata",
        )
    return len(text).to_bytes(8, "little") + text


def canonical_key(name: str, dtype: str) -> tuple[int, str]:
    """What the safetensors package sorts the tensors of a file by: dtype (larger first), then name."""
    return _RANKS[dtype], name


def canonical_order(tensors: Iterable[Spec]) -> list[Spec]:
    """The tensors in the order in which the safetensors package writes them."""
    return sorted(tensors, key=lambda spec: canonical_key(spec[0], spec[1]))


def _header_length(data: memoryview | bytes, size: int, path: str) -> int:
    if size == 0:
        raise MalformedFileError("the file is empty (0 bytes)", path=path, todo=AGAIN)
    if size < 8:
        raise MalformedFileError(
            f"the file is too short: {size} bytes",
            path=path,
            expected="A safetensors file begins with the 8 bytes of its header's length",
            todo=AGAIN,
        )
    length = int.from_bytes(data[:8], "little")
    if length > size - 8:
        raise MalformedFileError(
            f"the header claims {length:,} bytes, but only {size - 8:,} follow",
            path=path,
            expected="The file is truncated (a download that broke off), or not a safetensors file",
            todo=AGAIN,
        )
    if length > MAX_LENGTH:
        raise MalformedFileError(
            f"the header claims {length:,} bytes",
            path=path,
            expected=f"A safetensors header holds at most {MAX_LENGTH:,} bytes",
        )
    return length


def _decode(raw: bytes, path: str) -> str:
    if not raw.startswith(b"{"):
        raise MalformedFileError(
            f"the header begins with {raw[:1]!r}",
            path=path,
            expected="A safetensors header is a JSON object and begins with '{'",
            todo=AGAIN,
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFileError(
            f"the header is not UTF-8 text: byte {raw[error.start]:#04x} at {8 + error.start:,}",
            path=path,
            todo=AGAIN,
        ) from None


def _load(text: str, path: str) -> dict[str, Any]:
    try:
        table = _load_plain(text)
        if table is None:
            table = json.loads(text, object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        raise MalformedFileError(
            "the header has the same key more than once",
            path=path,
            keys=error.args[0],
            expected="Every name occurs once; readers disagree about which of two would count",
        ) from None
    except RecursionError:
        raise MalformedFileError("the header is nested too deeply", path=path, todo=AGAIN) from None
    except json.JSONDecodeError as error:
        problem = f"the header is not JSON: {error.msg} at character {error.pos:,}"
        if error.msg == "Extra data":
            problem = f"something other than spaces follows the header's JSON at character {error.pos:,}"
        raise MalformedFileError(problem, path=path, todo=AGAIN) from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise MalformedFileError(f"the header is not JSON we can read: {error}", path=path) from None
    return table


def _load_plain(text: str) -> dict[str, Any] | None:
    """The header's JSON by the fast parser, or None where a key might occur twice.

    A duplicate leaves fewer entries than fields in the text. Escapes could hide one, so that their presence,
    or anything unusual, is left to the careful parser.
    """
    marks = [text.count(f'"{name}"') for name in ("dtype", "shape", "data_offsets")]
    described = text.count(f'"{_METADATA}"')
    if "\\u" in text or described > 1:
        return None
    table = json.loads(text)
    if not isinstance(table, dict) or marks != [len(table) - described] * 3:
        return None
    if described:
        key = f'"{_METADATA}"'
        rest = text[text.index(key) + len(key) :].lstrip(_SPACES)
        if not rest.startswith(":"):
            return None
        _CAREFUL.raw_decode(rest[1:].lstrip(_SPACES))
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _DuplicateKeyError(sorted(name for name, count in counts.items() if count > 1))
    return table


_SPACES = " \t\r\n"
_CAREFUL = json.JSONDecoder(object_pairs_hook=_unique)


def _metadata(value: object, path: str) -> dict[str, str]:
    if value is None:  # absent; the package writes and reads null as absent too
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        wrong = (
            [key for key, item in value.items() if not isinstance(item, str)]
            if isinstance(value, dict)
            else []
        )
        raise MalformedFileError(
            f"{_METADATA} is not a table of strings",
            path=path,
            keys=wrong,
            expected="The format allows text values only",
        )
    return value


def _refuse_surrogates(texts: Iterable[str], path: str) -> None:
    broken = [text for text in texts if not _encodes(text)]
    if broken:
        raise MalformedFileError(
            "half of a surrogate pair in a name or in the metadata",
            path=path,
            keys=[text.encode("utf-8", "backslashreplace").decode() for text in broken],
            expected="Names and metadata are Unicode text",
        )


def _check_names(names: Sequence[str], metadata: Mapping[str, str]) -> None:
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        raise LayoutError(
            "tensors of the same name", keys=dict.fromkeys(twice), expected="Every name occurs once"
        )
    reserved = [name for name in names if name == _METADATA or not _encodes(name)]
    if reserved:
        raise LayoutError(
            "names that a safetensors file cannot hold",
            keys=[name.encode("utf-8", "backslashreplace").decode() for name in reserved],
            expected=f"A name is Unicode text other than {_METADATA}",
        )
    wrong = [
        str(key)
        for key, value in metadata.items()
        if not (isinstance(key, str) and isinstance(value, str) and _encodes(key) and _encodes(value))
    ]
    if wrong:
        raise LayoutError(
            "metadata that is not Unicode text",
            keys=wrong,
            expected="A safetensors file holds text values only",
            todo="Write other values as JSON text",
        )


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
