"""Gram matrices of tall factors, at about the speed at which the factors can be read."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]

# Factors of one shape are converted and multiplied together, this many elements at a time: numpy calls long
# enough for several threads to work side by side, buffers small enough for the caches.
_STACK_ELEMENTS = 1 << 19
# OpenBLAS has kernels for products of up to this many multiplications (rows · rank²) that neither pack nor
# start threads: the fastest way through a tall factor of usual rank, and safe on several threads of our own.
_SMALL_PRODUCT = 1_000_000
_SMALL_RANK = 40
# A float32 sum of squares outside this range may have lost terms to underflow or overflow.
_SAFE_LOW, _SAFE_HIGH = 1e-26, 1e32
# float16 to float32 by bits: sign and payload shifted into place, the exponent rebased by 2¹¹² in one exact
# multiplication, which also normalises subnormals. numpy's own cast takes six times as long where the build
# does not assume the F16C instructions.
_HALF_MASK = np.array(0x8FFFE000, np.uint32).view(np.int32)
_HALF_REBASE = np.float32(2.0**112)
# Where the exponent field is full (Inf, NaN) the multiplication leaves numbers from 65536 up.
_HALF_LIMIT_SQUARED = 65536.0**2


@dataclass(frozen=True, slots=True)
class Gram:
    """xᵀx, scaled by a power of two.

    Attributes:
        matrix: (rank, rank) float64; multiply by 2^(2·exponent).
        exponent: Of the power of two that x was divided by.
        finite: Whether x holds neither NaN nor Inf; the matrix means nothing otherwise.
    """

    matrix: Float64
    exponent: int
    finite: bool


class _Workspace(threading.local):
    """Buffers that one thread uses again and again: fresh memory would cost a page fault every 4 KiB."""

    def __init__(self) -> None:
        self.stack = np.empty(0, np.uint8)
        self.other = np.empty(0, np.uint8)

    def pair(self, shape: tuple[int, ...], compute: np.dtype[Any]) -> tuple[Array, Array]:
        """Two uninitialised arrays of one shape, valid until the next call on this thread."""
        size = math.prod(shape) * compute.itemsize
        if self.stack.size < size:
            self.stack, self.other = np.empty(size, np.uint8), np.empty(size, np.uint8)
        return self.stack[:size].view(compute).reshape(shape), self.other[:size].view(compute).reshape(shape)


_workspace = _Workspace()


def grams(factors: Sequence[Array]) -> list[Gram]:
    """The Gram matrices of tall factors (n, rank), of the dtypes and any strides that ``spectrum`` takes.

    float16 and bfloat16 are multiplied in float32 over blocks of rows that are summed in float64. Wider
    dtypes, and bfloat16 too small or too large for float32 squares, are multiplied in float64.
    """
    alike: dict[tuple[tuple[int, ...], np.dtype[Any], bool], list[int]] = {}
    for index, factor in enumerate(factors):
        alike.setdefault((factor.shape, factor.dtype, _by_columns(factor)), []).append(index)
    found: dict[int, Gram] = {}
    for indices in alike.values():
        found.update(zip(indices, _grams_alike([factors[index] for index in indices]), strict=True))
    return [found[index] for index in range(len(factors))]


def widened(factor: Array) -> tuple[Float64, int]:
    """The factor in float64, divided by 2^exponent so that its largest magnitude lies in [0.5, 1).

    Returns:
        The scaled factor and the exponent; the exponent is 0 for zero, empty and non-finite factors.
    """
    if factor.dtype == np.uint16:
        factor = (factor.astype(np.uint32) << np.uint32(16)).view(np.float32)
    wide = factor.astype(np.float64)
    largest = float(np.abs(wide).max(initial=0.0))
    exponent = int(np.frexp(largest)[1]) if np.isfinite(largest) else 0
    return np.ldexp(wide, -exponent), exponent


def _grams_alike(factors: list[Array]) -> list[Gram]:
    """The Gram matrices of factors that share shape, dtype and order."""
    dtype = factors[0].dtype
    if dtype == np.float16:
        matrices = _products(factors, np.dtype(np.float32))
        return [_half_gram(*both) for both in zip(factors, matrices, strict=True)]
    if dtype == np.uint16:
        matrices = _products(factors, np.dtype(np.float32))
        return [_bfloat16_gram(*both) for both in zip(factors, matrices, strict=True)]
    if dtype == np.float32:
        # The squares of float32 numbers and their sums always fit float64.
        matrices = _products(factors, np.dtype(np.float64))
        return [Gram(matrix, 0, bool(np.isfinite(matrix).all())) for matrix in matrices]
    return [_scaled_gram(factor) for factor in factors]


def _half_gram(factor: Array, matrix: Float64) -> Gram:
    finite = matrix.diagonal().max(initial=0.0) < _HALF_LIMIT_SQUARED or bool(np.isfinite(factor).all())
    return Gram(matrix, 0, bool(finite))


def _bfloat16_gram(factor: Array, matrix: Float64) -> Gram:
    squares = matrix.diagonal()
    if squares.size and squares.min() > _SAFE_LOW and squares.max() < _SAFE_HIGH:
        return Gram(matrix, 0, True)
    return _scaled_gram(factor)


def _scaled_gram(factor: Array) -> Gram:
    wide, exponent = widened(factor)
    matrix = _products([wide], np.dtype(np.float64))[0]
    return Gram(matrix, exponent, bool(np.isfinite(matrix).all()))


def _products(factors: list[Array], compute: np.dtype[Any]) -> Float64:
    """Every xᵀx, (count, rank, rank), multiplied in ``compute`` and summed in float64."""
    length, rank = factors[0].shape
    result = np.zeros((len(factors), rank, rank))
    step = max(1, _STACK_ELEMENTS // max(1, length * rank))
    for start in range(0, len(factors) if result.size else 0, step):
        result[start : start + step] = _stack_products(factors[start : start + step], compute)
    return result


def _stack_products(factors: list[Array], compute: np.dtype[Any]) -> Float64:
    count = len(factors)
    length, rank = factors[0].shape
    turned = _by_columns(factors[0])
    stack, other = _workspace.pair((count, rank, length) if turned else (count, length, rank), compute)
    _widen([factor.T if turned else factor for factor in factors], stack)
    if rank <= _SMALL_RANK:
        # numpy hands a matrix times its own transpose to syrk, which the small kernels do not cover.
        np.copyto(other, stack)
    else:
        other = stack
    parts = _parts(length, rank)
    cut = (count, rank, parts, -1) if turned else (count, parts, -1, rank)
    to_left, to_right = ((0, 2, 1, 3), (0, 2, 3, 1)) if turned else ((0, 1, 3, 2), (0, 1, 2, 3))
    # Inf and NaN in, or overflow on the way: the caller looks at the result.
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.matmul(stack.reshape(cut).transpose(to_left), other.reshape(cut).transpose(to_right))
    total: Float64 = product.sum(axis=1, dtype=np.float64)
    return total


def _widen(factors: list[Array], stack: Array) -> None:
    """Convert factors of one shape to the compute dtype, one after the other into ``stack``."""
    dtype = factors[0].dtype
    if dtype == np.float16:
        bits = stack.view(np.int32)
        for factor, row in zip(factors, bits, strict=True):
            np.copyto(row, factor.view(np.int16))
        np.left_shift(bits, 13, out=bits)
        np.bitwise_and(bits, _HALF_MASK, out=bits)
        np.multiply(stack, _HALF_REBASE, out=stack)
    elif dtype == np.uint16:
        bits = stack.view(np.uint32)
        for factor, row in zip(factors, bits, strict=True):
            np.copyto(row, factor)
        np.left_shift(bits, 16, out=bits)
    else:
        for factor, row in zip(factors, stack, strict=True):
            np.copyto(row, factor)


def _by_columns(factor: Array) -> bool:
    """Whether a factor (n, rank) lies in memory as (rank, n), as a transposed down does."""
    return abs(factor.strides[0]) < abs(factor.strides[1])


def _parts(length: int, rank: int) -> int:
    """Into how many equal blocks of rows a factor is cut so that small kernels apply; 1 where they cannot."""
    needed = -(-length * rank * rank // _SMALL_PRODUCT)
    if rank <= _SMALL_RANK:
        for parts in range(needed, min(4 * needed, length) + 1):
            if length % parts == 0:
                return parts
    return 1
