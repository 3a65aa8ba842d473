"""Rows and columns of stored tensors, moved as they are: bits are copied, never computed with.

Whatever the dtype, float8 included, a row is a run of bytes and zero is zero bits. Everything is done when the data
is asked for, so that a conversion holds one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loratools.errors import MalformedFileError
from loratools.model import Rows
from loratools.tensors import DTYPES, TensorRef, carried

if TYPE_CHECKING:
    import numpy
    import torch

    Array = numpy.ndarray[Any, Any]

_WHOLE = Rows(((0, 1),), of=1)
# How much of two tensors is compared at a time (bytes): it stays in the processor's cache.
_STRIDE = 1 << 18


class BitsSource:
    """Data made on request as an array of the elements' bits."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Array]) -> None:
        self.make = make

    def raw(self) -> memoryview:
        """The bytes of the array; without a copy where they follow each other already."""
        flat = self._flat()
        return flat.view("u1").data if flat.size else memoryview(b"")

    def torch(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The array as a tensor of the dtype that the bits mean."""
        import torch

        kind: torch.dtype = getattr(torch, DTYPES[dtype].torch)
        flat = self._flat()
        if not flat.size:
            return torch.empty(shape, dtype=kind)
        if not (flat.flags.aligned and flat.flags.writeable):
            flat = (
                flat.copy()
            )  # rows of a mapped file, which torch wants aligned and warns about where they are fixed
        return torch.frombuffer(flat.data, dtype=kind).reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return carried(self.raw())

    def _flat(self) -> Array:
        import numpy

        return numpy.ascontiguousarray(self.make()).reshape(-1)


def bits(ref: TensorRef) -> Array:
    """The elements' bits as unsigned integers, in the tensor's logical shape.

    Raises:
        MalformedFileError: Several elements share a byte.
    """
    import numpy

    array = numpy.frombuffer(ref.raw(), _unsigned(ref)).reshape(ref.stored_shape)
    return array.T if ref.transposed else array


def _unsigned(ref: TensorRef) -> str:
    """numpy's name of the integers that are as wide as the tensor's elements."""
    size = DTYPES[ref.dtype].bits
    if size % 8:
        raise MalformedFileError(f"{ref.name}: rows of a {ref.dtype} tensor cannot be taken apart")
    return f"u{size // 8}"


def units(rows: Rows | None, of: int) -> list[int]:
    """The rows as numbers of equal shares, of which the weight has ``of``: a multiple of the rows' own count."""
    spans, parts = rows or _WHOLE
    factor = of // parts
    return [unit for start, stop in spans for unit in range(start * factor, stop * factor)]


def taken(ref: TensorRef, axis: int, places: Sequence[int], parts: int) -> TensorRef:
    """Some of a tensor's equal shares along an axis, in the order given.

    Args:
        ref: The tensor.
        axis: Along which its shares lie.
        places: Numbers of shares.
        parts: How many shares it has; its length along the axis is a multiple.
    """
    share = ref.shape[axis] // parts
    shape = (*ref.shape[:axis], share * len(places), *ref.shape[axis + 1 :])
    first = places[0] if places else 0
    one_run = list(places) == list(range(first, first + len(places)))

    def make() -> Array:
        array = bits(ref)
        apart = array.reshape(*array.shape[:axis], parts, share, *array.shape[axis + 1 :])
        if one_run:
            # A view: of whole rows not even their bytes are copied.
            return apart[(slice(None),) * axis + (slice(first, first + len(places)),)]
        return apart.take(list(places), axis=axis)

    return TensorRef("", shape, ref.dtype, BitsSource(make))


def chosen(ref: TensorRef, axis: int, places: Sequence[int]) -> TensorRef:
    """Some columns or rows of a tensor by number."""
    shape = (*ref.shape[:axis], len(places), *ref.shape[axis + 1 :])
    return TensorRef("", shape, ref.dtype, BitsSource(lambda: bits(ref).take(list(places), axis=axis)))


class Block:
    """Where a tensor lies in a larger one that is zero elsewhere.

    Attributes:
        ref: What lies there.
        shares: Which shares of the larger tensor's rows its rows are, in order.
        column: Its first column; None where it spans the whole width.
    """

    __slots__ = ("column", "ref", "shares")

    def __init__(self, ref: TensorRef, shares: Sequence[int], column: int | None = None) -> None:
        self.ref = ref
        self.shares = tuple(shares)
        self.column = column


def assembled(blocks: Sequence[Block], axis: int, parts: int, columns: int | None = None) -> TensorRef:
    """A tensor made of blocks of rows, zero where there are none.

    Args:
        blocks: Of one dtype, with equally long shares.
        axis: Along which the shares lie.
        parts: How many shares the result has.
        columns: Its width along the next axis, where the blocks have columns of their own.
    """
    first = blocks[0]
    share = first.ref.shape[axis] // len(first.shares)
    shape = list(first.ref.shape)
    shape[axis] = share * parts
    across = axis + 1 if axis == 0 else 0
    if columns is not None:
        shape[across] = columns

    def make() -> Array:
        import numpy

        whole = numpy.zeros(shape, _unsigned(first.ref))
        for block in blocks:
            source = numpy.moveaxis(bits(block.ref), axis, 0)
            goal = numpy.moveaxis(whole, axis, 0)
            for place, unit in enumerate(block.shares):
                rows = source[place * share : (place + 1) * share]
                into = goal[unit * share : (unit + 1) * share]
                if block.column is None:
                    into[...] = rows
                else:
                    into[:, block.column : block.column + rows.shape[1]] = rows
        return whole

    return TensorRef("", tuple(shape), first.ref.dtype, BitsSource(make))


def stacked(refs: Sequence[TensorRef]) -> TensorRef:
    """Tensors of one dtype below each other, along their first axis."""
    if len(refs) == 1:
        return refs[0].renamed("")
    shape = (sum(ref.shape[0] for ref in refs), *refs[0].shape[1:])

    def make() -> Array:
        import numpy

        return numpy.concatenate([bits(ref) for ref in refs])

    return TensorRef("", shape, refs[0].dtype, BitsSource(make))


def support(ref: TensorRef, axis: int, parts: Sequence[Sequence[int]], of: int) -> Array:
    """Which columns of a factor are other than zero in which parts of its rows: booleans (parts, columns).

    Args:
        ref: A factor; its rows run along ``axis`` (0 or 1), its columns along the other.
        axis: Of the rows.
        parts: The shares that each part consists of.
        of: How many shares there are.
    """
    import numpy

    rows = numpy.moveaxis(bits(ref), axis, 0)
    across = rows.shape[1] if rows.ndim > 1 else 1
    shares = rows.reshape(of, rows.shape[0] // of, across, -1)
    # Minus zero is zero: the sign is the highest bit of every floating dtype.
    magnitude = numpy.array((1 << (8 * shares.dtype.itemsize - 1)) - 1, shares.dtype)
    # Of a factor that was trained whole the first row of each share is enough.
    for looked_at in (shares[:, :1], shares):
        columns = ((numpy.bitwise_or.reduce(looked_at, axis=1) & magnitude) != 0).any(axis=2)
        if columns.all():
            break
    return numpy.array([columns[list(part)].any(axis=0) for part in parts])


def same_bits(one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors hold the same bits in the same shape."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if one.transposed != other.transposed:
        return bool((bits(one) == bits(other)).all())
    if one.source is other.source:
        return True
    mine, theirs = one.raw().cast("B"), other.raw().cast("B")
    # Comparing views element by element would be slow; this compares memory, and stops where it first differs.
    return all(
        mine[start : start + _STRIDE].tobytes().startswith(theirs[start : start + _STRIDE])
        for start in range(0, mine.nbytes, _STRIDE)
    )
