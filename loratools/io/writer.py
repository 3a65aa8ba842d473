"""Write a safetensors file: the header first, then one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from loratools.errors import ShapeError
from loratools.io.atomic import atomic_output
from loratools.io.header import build, canonical_key
from loratools.tensors import TensorRef, torch_bytes

if TYPE_CHECKING:
    from hashlib import _Hash

_NONE: Mapping[str, Digest] = MappingProxyType({})


class Digest(NamedTuple):
    """A SHA-256 over part of a file's data that is written into the file's own header.

    Attributes:
        digits: How many hexadecimal digits of it are kept.
        before: Bytes that it begins with, before the file's.
        start: Where the part begins, in bytes from the start of the data (the header is not counted).
        stop: Where it ends; None for the end of the data.
    """

    digits: int = 64
    before: bytes = b""
    start: int = 0
    stop: int | None = None

    @property
    def blank(self) -> str:
        """What stands in the header until the value is known."""
        return "0" * self.digits


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
    running = {key: _Running(digest) for key, digest in computed.items()}
    start = build(specs, {**metadata, **{key: digest.blank for key, digest in computed.items()}})
    size = len(start) + sum(ref.nbytes for ref in refs)
    with atomic_output(path, overwrite, size) as temporary:
        with open(temporary, "wb") as file:
            file.write(start)
            for ref in refs:
                data = _data(ref)
                file.write(data)
                for digest in running.values():
                    digest.update(data)
                if progress is not None:
                    progress(ref.nbytes)
            if running:
                # Blanks and values have one length, and so have the two headers.
                file.seek(0)
                file.write(
                    build(specs, {**metadata, **{key: digest.value() for key, digest in running.items()}})
                )
        if check is not None:
            check(os.fspath(temporary))
    return size


class _Running:
    """A digest that is being computed, chunk by chunk in the file's order."""

    def __init__(self, digest: Digest) -> None:
        import hashlib

        self._digest = digest
        self._sha: _Hash = hashlib.sha256(digest.before)
        self._position = 0

    def update(self, chunk: memoryview) -> None:
        """Take the next bytes of the data."""
        start, stop = self._digest.start - self._position, self._digest.stop
        self._position += chunk.nbytes
        last = chunk.nbytes if stop is None else stop - self._position + chunk.nbytes
        if last > 0 and start < chunk.nbytes:
            self._sha.update(chunk.cast("B")[max(start, 0) : last])

    def value(self) -> str:
        """The digits."""
        return self._sha.hexdigest()[: self._digest.digits]


def _data(ref: TensorRef) -> memoryview:
    """The bytes of the logical tensor, checked against its shape."""
    data = torch_bytes(ref.load().contiguous()) if ref.transposed else ref.raw()
    if data.nbytes != ref.nbytes:
        raise ShapeError(
            f"tensor {ref.name}: its data has {data.nbytes:,} bytes",
            expected=f"{ref.dtype} of shape {list(ref.shape)} takes {ref.nbytes:,}",
        )
    return data
