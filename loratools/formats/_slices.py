"""Rows of a stored matrix, and matrices one above the other, as tensors of their own: views of bytes, no arithmetic.

Matrices are C-contiguous, so that rows are consecutive bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.tensors import BytesSource, TensorRef, torch_bytes

if TYPE_CHECKING:
    import torch


class _Rows:
    """Some consecutive rows of a tensor."""

    __slots__ = ("of", "start", "stop")

    def __init__(self, of: TensorRef, start: int, stop: int) -> None:
        self.of = of
        self.start = start
        self.stop = stop

    def raw(self) -> memoryview:
        """Their bytes, without a copy."""
        data = _logical(self.of)
        size = data.nbytes // self.of.shape[0]
        return data[self.start * size : self.stop * size]

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:  # noqa: ARG002 - the tensor knows
        """A view of the whole."""
        return self.of.load()[self.start : self.stop]


class _Stack:
    """Tensors one above the other."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[TensorRef]) -> None:
        self.parts = parts

    def raw(self) -> memoryview:
        """A copy of their bytes."""
        return memoryview(bytearray().join([_logical(part) for part in self.parts]))

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """A copy."""
        return BytesSource(self.raw()).torch(shape, dtype)


def rows(ref: TensorRef, start: int, stop: int) -> TensorRef:
    """Rows ``start`` to ``stop`` of a tensor (rows, …), under its name with the rows behind it."""
    name = f"{ref.name}[{start}:{stop}]"
    return TensorRef(name, (stop - start, *ref.shape[1:]), ref.dtype, _Rows(ref, start, stop))


def stacked(name: str, parts: Sequence[TensorRef]) -> TensorRef:
    """Tensors (rows, …) of one dtype one above the other."""
    height = sum(part.shape[0] for part in parts)
    return TensorRef(name, (height, *parts[0].shape[1:]), parts[0].dtype, _Stack(parts))


def _logical(ref: TensorRef) -> memoryview:
    return torch_bytes(ref.load().contiguous()) if ref.transposed else ref.raw()
