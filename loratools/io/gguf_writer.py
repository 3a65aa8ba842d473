"""Write a GGUF file: the header first, then one tensor at a time, aligned. Source: ggml ``docs/gguf.md``."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping

from loratools.errors import LayoutError
from loratools.io import json_text
from loratools.io._gguf_values import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    FLOATING,
    MAGIC,
    MOST_AXES,
    NUMBERS,
    UNUSUAL,
    USUAL,
    VERSION,
    packed_string,
    packed_value,
)
from loratools.io.atomic import atomic_output
from loratools.io.gguf_files import QuantisedSource
from loratools.io.writer import data_of
from loratools.tensors import TensorRef

__all__ = ["gguf_size", "write_gguf"]

# ggml's limit of a name, in bytes.
_LONGEST_NAME = 63


def write_gguf(
    path: str | os.PathLike[str],
    tensors: Iterable[TensorRef],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    check: Callable[[str], None] | None = None,
) -> int:
    """Write tensors under their names in the order given; at most one of them is in memory at a time.

    The file appears under its name when it is complete. It may be a file that the tensors are mapped from.

    Args:
        path: The output.
        tensors: What to write.
        metadata: The header's values as text; their types are the usual ones, or those that were read.
        overwrite: Whether an existing file may be replaced.
        progress: Called after each tensor with its size in bytes.
        check: Called with the path of what was written, before it takes its name; an error keeps it from that.

    Returns:
        The file's size in bytes.

    Raises:
        OutputExistsError: The output is there, and ``overwrite`` is false.
        LayoutError: A name or a dtype that GGUF cannot hold, or metadata that is not of its type.
        WriteError: The system refuses; nothing is left behind.
    """
    refs = list(tensors)
    start, sizes, alignment = _start(refs, metadata)
    total = len(start) + sum(size + -size % alignment for size in sizes)
    with atomic_output(path, overwrite, total) as temporary:
        with open(temporary, "wb") as file:
            file.write(start)
            for ref, size in zip(refs, sizes, strict=True):
                blocks = _quantised(ref)
                file.write(blocks.stored() if blocks is not None else data_of(ref))
                file.write(bytes(-size % alignment))
                if progress is not None:
                    progress(ref.nbytes)
        if check is not None:
            check(os.fspath(temporary))
    return total


def gguf_size(tensors: Iterable[TensorRef], metadata: Mapping[str, str]) -> int:
    """How many bytes ``write_gguf`` would write.

    Raises:
        LayoutError: As there.
    """
    start, sizes, alignment = _start(list(tensors), metadata)
    return len(start) + sum(size + -size % alignment for size in sizes)


def _start(refs: list[TensorRef], metadata: Mapping[str, str]) -> tuple[bytes, list[int], int]:
    """The header, padded; the sizes of the tensors in bytes; and the alignment."""
    types = _types(metadata)
    values = {key: text for key, text in metadata.items() if key != UNUSUAL}
    alignment = int(values.get(ALIGNMENT_KEY, ALIGNMENT))
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(refs), len(values))]
    parts += [packed_string(key) + packed_value(key, text, types[key]) for key, text in values.items()]
    sizes: list[int] = []
    offset = 0
    for ref in refs:
        number, size = _stored_as(ref)
        name = packed_string(ref.name)
        axes = struct.pack(f"<I{len(ref.shape)}Q", len(ref.shape), *ref.shape[::-1])
        parts += [name, axes, struct.pack("<IQ", number, offset)]
        offset += size + -size % alignment
        sizes.append(size)
    head = b"".join(parts)
    return head + bytes(-len(head) % alignment), sizes, alignment


def _types(metadata: Mapping[str, str]) -> dict[str, str]:
    text = metadata.get(UNUSUAL, "{}")
    try:
        unusual = json_text.loads(text)
        known = isinstance(unusual, dict) and all(isinstance(kind, str) for kind in unusual.values())
    except ValueError:
        known = False
    if not known:
        raise LayoutError(
            f"the metadata's {UNUSUAL} is {json_text.brief(text)}",
            expected="JSON was expected: an object with the types of values",
            todo=f"Leave {UNUSUAL} out of the metadata",
        )
    return {key: unusual.get(key) or USUAL.get(key, "string") for key in metadata}


def _stored_as(ref: TensorRef) -> tuple[int, int]:
    """ggml's type of a tensor, and its size in bytes."""
    if len(ref.name.encode()) > _LONGEST_NAME or len(ref.shape) > MOST_AXES:
        raise LayoutError(
            f"{ref.name} of shape {list(ref.shape)} cannot be written as GGUF",
            expected=f"Names of at most {_LONGEST_NAME} bytes and {MOST_AXES} axes were expected",
        )
    blocks = _quantised(ref)
    if blocks is not None:
        return blocks.number, blocks.stored().nbytes
    if ref.dtype not in NUMBERS:
        raise LayoutError(
            f"{ref.name} is {ref.dtype}, which GGUF has no type for",
            expected=f"It has {', '.join(FLOATING)}",
            todo="Choose one with --dtype",
        )
    return NUMBERS[ref.dtype], ref.nbytes


def _quantised(ref: TensorRef) -> QuantisedSource | None:
    """What holds a tensor as blocks that can be copied as they are; None where it has to be computed."""
    source = ref.source
    return source if isinstance(source, QuantisedSource) and not ref.transposed else None
