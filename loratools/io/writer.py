"""Write a safetensors file: the header first, then one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from loratools.errors import ShapeError
from loratools.io.atomic import atomic_output
from loratools.io.header import build, canonical_key
from loratools.tensors import TensorRef, torch_bytes


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Iterable[TensorRef],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    order: Literal["canonical", "given"] = "canonical",
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write tensors under their names; at most one of them is in memory at a time.

    The file appears under its name when it is complete. It may be a file that the tensors are mapped from.

    Args:
        path: The output.
        tensors: What to write.
        metadata: String metadata; its order is kept.
        overwrite: Whether an existing file may be replaced.
        order: "canonical" for the safetensors package's order, "given" to keep the tensors' own.
        progress: Called after each tensor with its size in bytes.

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
    start = build([(ref.name, ref.dtype, ref.shape) for ref in refs], metadata)
    size = len(start) + sum(ref.nbytes for ref in refs)
    with atomic_output(path, overwrite, size) as temporary, open(temporary, "wb") as file:
        file.write(start)
        for ref in refs:
            file.write(_data(ref))
            if progress is not None:
                progress(ref.nbytes)
    return size


def _data(ref: TensorRef) -> memoryview:
    """The bytes of the logical tensor, checked against its shape."""
    data = torch_bytes(ref.load().contiguous()) if ref.transposed else ref.raw()
    if data.nbytes != ref.nbytes:
        raise ShapeError(
            f"tensor {ref.name}: its data has {data.nbytes:,} bytes",
            expected=f"{ref.dtype} of shape {list(ref.shape)} takes {ref.nbytes:,}",
        )
    return data
