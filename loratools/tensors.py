"""Tensors that know their shape and dtype now and their data on request.

Nothing here imports torch or numpy until data is asked for, so that a header is read in milliseconds.
Bytes are little-endian and C-contiguous throughout, as the safetensors format defines them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from loratools.errors import MalformedFileError, ShapeError

if TYPE_CHECKING:
    import numpy
    import torch


class DType(NamedTuple):
    """One row of the dtype table.

    Attributes:
        name: The safetensors name.
        bits: Size of one element.
        torch: Attribute of the torch module, or empty where torch has none.
        numpy: numpy's dtype string, or empty where numpy has none.
        floating: Whether values are floating point.
    """

    name: str
    bits: int
    torch: str
    numpy: str
    floating: bool


DTYPES: dict[str, DType] = {
    row[0]: DType(*row)
    for row in (
        ("BOOL", 8, "bool", "?", False),
        ("U8", 8, "uint8", "u1", False),
        ("I8", 8, "int8", "i1", False),
        ("U16", 16, "uint16", "<u2", False),
        ("I16", 16, "int16", "<i2", False),
        ("U32", 32, "uint32", "<u4", False),
        ("I32", 32, "int32", "<i4", False),
        ("U64", 64, "uint64", "<u8", False),
        ("I64", 64, "int64", "<i8", False),
        ("F16", 16, "float16", "<f2", True),
        ("BF16", 16, "bfloat16", "", True),
        ("F32", 32, "float32", "<f4", True),
        ("F64", 64, "float64", "<f8", True),
        ("C64", 64, "complex64", "<c8", False),
        ("F8_E4M3", 8, "float8_e4m3fn", "", True),
        ("F8_E5M2", 8, "float8_e5m2", "", True),
        ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", "", True),
        ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", "", True),
        ("F8_E8M0", 8, "float8_e8m0fnu", "", True),
        ("F6_E2M3", 6, "", "", True),
        ("F6_E3M2", 6, "", "", True),
        ("F4", 4, "float4_e2m1fn_x2", "", True),
    )
}

_SCALAR_CODES = {
    "BOOL": "<?",
    "U8": "<B",
    "I8": "<b",
    "U16": "<H",
    "I16": "<h",
    "U32": "<I",
    "I32": "<i",
    "U64": "<Q",
    "I64": "<q",
    "F16": "<e",
    "F32": "<f",
    "F64": "<d",
}


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """Size in bytes of a tensor; sub-byte dtypes are packed and must fill whole bytes."""
    bits = math.prod(shape) * DTYPES[dtype].bits
    if bits % 8:
        raise MalformedFileError(f"a {dtype} tensor of shape {list(shape)} does not fill whole bytes")
    return bits // 8


class Source(Protocol):
    """Where a tensor's data lies. It can be pickled, by the file's name and place or as bytes."""

    def raw(self) -> memoryview:
        """The tensor's bytes, little-endian and C-contiguous, without a copy where possible."""

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The tensor on the CPU, sharing memory with the source where possible."""


def carried(data: memoryview) -> tuple[Any, ...]:
    """How a source is pickled that whoever unpickles it could not find again: as its bytes."""
    return BytesSource, (bytearray(data),)  # which may be written to: torch warns of others


class BytesSource:
    """Data that lies in a buffer: a mapped file, or bytes in memory."""

    __slots__ = ("buffer",)

    def __init__(self, buffer: memoryview | bytearray) -> None:
        self.buffer = memoryview(buffer)

    def raw(self) -> memoryview:
        """The buffer itself."""
        return self.buffer

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """A view of the buffer; it must not be written to."""
        import torch

        kind: torch.dtype = getattr(torch, _torch_name(dtype))
        if not self.buffer.nbytes:
            return torch.empty(shape, dtype=kind)
        return torch.frombuffer(self.buffer, dtype=kind).reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return carried(self.buffer)


class LazySource:
    """Data computed on request; the callable returns a CPU tensor."""

    __slots__ = ("load",)

    def __init__(self, load: Callable[[], torch.Tensor]) -> None:
        self.load = load

    def raw(self) -> memoryview:
        """The bytes of the computed tensor."""
        return torch_bytes(self.load())

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:  # noqa: ARG002 - the tensor knows
        """The computed tensor."""
        return self.load()

    def __reduce__(self) -> tuple[Any, ...]:
        return carried(self.raw())


class TensorRef(NamedTuple):
    """A named tensor: its shape and dtype now, its data on ``load()``.

    Attributes:
        name: The key in the file it came from; empty where the tensor was computed.
        shape: The logical shape.
        dtype: The safetensors name of the store dtype, a key of ``DTYPES``.
        source: Where the data lies.
        transposed: Whether the source holds the transpose of the logical (two-dimensional) tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: Source
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes in the store dtype."""
        return nbytes(self.shape, self.dtype)

    @property
    def numel(self) -> int:
        """Count of elements."""
        return math.prod(self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape as the source holds it."""
        return self.shape[::-1] if self.transposed else self.shape

    def raw(self) -> memoryview:
        """The bytes as the source holds them (see ``stored_shape``)."""
        return self.source.raw()

    def load(self) -> torch.Tensor:
        """The tensor on the CPU in its store dtype; shares memory with the file and must not be written to."""
        tensor = self.source.torch(self.stored_shape, self.dtype)
        if tuple(tensor.shape) != self.stored_shape:
            tensor = tensor.reshape(self.stored_shape)
        return tensor.t() if self.transposed else tensor

    def numpy(self, *, widen: bool = True) -> numpy.ndarray[Any, Any]:
        """The data as an array; bfloat16 widened to float32, other dtypes as stored.

        Args:
            widen: If false, bfloat16 comes as the uint16 of its bits, without a copy.

        Raises:
            MalformedFileError: The dtype has no numpy equivalent (float8 and below).
        """
        import numpy

        kind = DTYPES[self.dtype]
        data = self.raw()
        if self.dtype == "BF16":
            array = numpy.frombuffer(data, "<u2")
            if widen:
                array = (array.astype(numpy.uint32) << 16).view(numpy.float32)
        elif kind.numpy:
            array = numpy.frombuffer(data, kind.numpy)
        elif kind.torch:
            array = self.source.torch(self.stored_shape, self.dtype).float().numpy()
        else:
            raise MalformedFileError(f"{self.name}: data of dtype {self.dtype} cannot be computed with")
        array = array.reshape(self.stored_shape)
        return array.T if self.transposed else array

    def scalar(self) -> float:
        """The value of a one-element tensor, read without numpy or torch where the dtype allows.

        Raises:
            MalformedFileError: More or less than one element.
        """
        if self.numel != 1:
            raise MalformedFileError(
                f"{self.name} has shape {list(self.shape)}",
                expected="A single number was expected",
                todo="The file is damaged; get it again from where it was made",
            )
        data = self.raw()
        if self.dtype == "BF16":
            return float(struct.unpack("<f", b"\0\0" + bytes(data))[0])
        code = _SCALAR_CODES.get(self.dtype)
        return float(struct.unpack(code, data)[0]) if code else float(self.load().item())

    def renamed(self, name: str) -> TensorRef:
        """The same tensor under another key."""
        return self._replace(name=name)

    def reshaped(self, shape: tuple[int, ...]) -> TensorRef:
        """The same elements in the same order under another shape.

        Raises:
            ShapeError: It has another count of elements.
        """
        if math.prod(shape) != self.numel:
            raise ShapeError(f"{self.name}: {list(self.shape)} cannot be seen as {list(shape)}")
        return self._replace(shape=shape)

    def flipped(self) -> TensorRef:
        """The transpose of a two-dimensional tensor, without touching data."""
        return self._replace(shape=self.shape[::-1], transposed=not self.transposed)


def from_torch(name: str, tensor: torch.Tensor) -> TensorRef:
    """A reference to a tensor in memory."""
    cpu = tensor.detach().cpu()
    return TensorRef(name, tuple(cpu.shape), dtype_of(cpu), LazySource(lambda: cpu))


def from_scalar(name: str, value: float, dtype: str = "F32") -> TensorRef:
    """A reference to a 0-d tensor that holds ``value``."""
    code = _SCALAR_CODES.get(dtype)
    if code is None:
        raise MalformedFileError(f"{name}: a number cannot be stored as {dtype}")
    number = value if DTYPES[dtype].floating else int(value)
    return TensorRef(name, (), dtype, BytesSource(memoryview(bytearray(struct.pack(code, number)))))


def dtype_of(tensor: torch.Tensor) -> str:
    """The safetensors name of a torch tensor's dtype.

    Raises:
        MalformedFileError: The format has no name for it.
    """
    wanted = str(tensor.dtype).removeprefix("torch.")
    for row in DTYPES.values():
        if row.torch == wanted:
            return row.name
    raise MalformedFileError(f"torch dtype {wanted} has no place in a safetensors file")


def torch_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a CPU tensor, without a copy where it is contiguous."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data


def _torch_name(dtype: str) -> str:
    name = DTYPES[dtype].torch
    if not name:
        raise MalformedFileError(f"data of dtype {dtype} cannot be computed with")
    return name
