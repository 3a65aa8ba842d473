"""Write a safetensors file: the header first, then one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import BinaryIO, Literal

from loratools.errors import ShapeError
from loratools.io._digests import Digest, Running
from loratools.io.atomic import atomic_output
from loratools.io.header import build, canonical_key
from loratools.tensors import TensorRef, torch_bytes

__all__ = ["Digest", "write_safetensors"]

_NONE: Mapping[str, Digest] = MappingProxyType({})


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Iterable[TensorRef],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    order: Literal["canonical", "given"] = "canonical",
    computed: Mapping[str, Digest] = _NONE,
    progress: Callable[[int], None] | None = None,
    check: Callable[[str], None] | None = None,
) -> int:
    """Write tensors under their names; at most one of them is in memory at a time.

    The file appears under its name when it is complete. It may be a file that the tensors are mapped from.

    Args:
        path: The output.
        tensors: What to write.
        metadata: String metadata; its order is kept.
        overwrite: Whether an existing file may be replaced.
        order: "canonical" for the safetensors package's order, "given" to keep the tensors' own.
        computed: Metadata whose values are digests of the data, which is read once for all of them. Keys that
            ``metadata`` has too keep their place there.
        progress: Called after each tensor with its size in bytes.
        check: Called with the path of what was written, before it takes its name; an error keeps it from that.

    Returns:
        The file's size in bytes.

    Raises:
        OutputExistsError: The output is there, and ``overwrite`` is false.
        LayoutError: Names that occur twice or cannot be written, or metadata that is not text.
        ShapeError: A tensor's data is not as long as its shape says.
        WriteError: The system refuses; nothing is left behind.
    """
    refs = list(tensors)
    if order == "canonical":
        refs.sort(key=lambda ref: canonical_key(ref.name, ref.dtype))
    specs = [(ref.name, ref.dtype, ref.shape) for ref in refs]
    start = build(specs, {**metadata, **{key: digest.blank for key, digest in computed.items()}})
    size = len(start) + sum(ref.nbytes for ref in refs)
    with atomic_output(path, overwrite, size) as temporary:
        with open(temporary, "wb") as file:
            file.write(start)
            found = _write_data(file, refs, computed, progress)
            if found:
                # Blanks and values have one length, and so have the two headers.
                file.seek(0)
                file.write(build(specs, {**metadata, **found}))
        if check is not None:
            check(os.fspath(temporary))
    return size


def _write_data(
    file: BinaryIO,
    refs: Iterable[TensorRef],
    computed: Mapping[str, Digest],
    progress: Callable[[int], None] | None,
) -> dict[str, str]:
    """Write tensors one by one, and compute the digests of what is written."""
    with Running(computed) as digests:
        for ref in refs:
            data = data_of(ref)
            digests.update(data)
            file.write(data)
            del data  # before the next is made
            digests.keep_up()
            if progress is not None:
                progress(ref.nbytes)
    return digests.values()


def data_of(ref: TensorRef) -> memoryview:
    """The bytes of the logical tensor, checked against its shape.

    Raises:
        ShapeError: They are more or fewer than its shape says.
    """
    data = torch_bytes(ref.load().contiguous()) if ref.transposed else ref.raw()
    if data.nbytes != ref.nbytes:
        raise ShapeError(
            f"tensor {ref.name}: its data has {data.nbytes:,} bytes",
            expected=f"{ref.dtype} of shape {list(ref.shape)} takes {ref.nbytes:,}",
        )
    return data
