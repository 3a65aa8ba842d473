"""What a module changes, put together from the stored tensors that hold its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from loratools.errors import ShapeError
from loratools.io import base as io_base
from loratools.io.base import Weight
from loratools.maths import float8
from loratools.ops._changes import Piece, Span


def rows_first(tensor: torch.Tensor, turned: bool) -> torch.Tensor:
    """A view of a stored tensor with its outputs on the first axis.

    Args:
        tensor: As stored; experts in three axes stay, their ΔW comes as they are stored.
        turned: Whether that is (in, out).
    """
    return tensor.t() if turned and tensor.dim() == 2 else tensor


def outputs_first(tensor: torch.Tensor, turned: bool) -> torch.Tensor:
    """The same of any tensor; a single number as a vector."""
    return rows_first(tensor.reshape(1) if tensor.dim() == 0 else tensor, turned)


def read(weight: Weight, scale: Weight | None, dtype: torch.dtype) -> torch.Tensor:
    """A stored tensor, with its float8 scales in ``dtype``, without as it is stored.

    Raises:
        ShapeError: The scales do not fit it.
        NonFiniteError: A scale is NaN or infinite.
    """
    stored = io_base.load(weight)
    return stored if scale is None else float8.dequantise(stored, io_base.load(scale), dtype)


def assemble(pieces: Sequence[Piece], dtype: torch.dtype) -> torch.Tensor:
    """All rows of what a module changes, (out, in[, kh, kw]).

    Args:
        pieces: The stored tensors that hold them, in any order; they cover all rows.
        dtype: Of the result where it is put together of several, or of float8 with scales: float32 or float64. One
            tensor that holds them all comes as it is stored.

    Raises:
        ShapeError: Rows are missing, or the tensors have different inputs.
    """
    parts = [rows_first(read(piece.weight, piece.scale, dtype), piece.turned) for piece in pieces]
    if len(pieces) == 1 and is_whole(pieces[0].spans, len(parts[0])):
        return parts[0]
    total = max(stop for piece in pieces for _, stop, _ in piece.spans)
    covered = sum(stop - start for piece in pieces for start, stop, _ in piece.spans)
    shapes = {tuple(part.shape[1:]) for part in parts}
    if covered != total or len(shapes) != 1:
        raise ShapeError(
            f"{covered} of {total} rows, of inputs {sorted(map(list, shapes))}",
            path=pieces[0].weight.file,
            keys=[piece.weight.key for piece in pieces],
            expected="Tensors that together hold all rows of what the adapter changes were expected",
            todo="Give the base model that the adapter was trained on",
        )
    whole = torch.empty(total, *shapes.pop(), dtype=dtype)
    for piece, part in zip(pieces, parts, strict=True):
        for start, stop, at in piece.spans:
            whole[start:stop] = part[at : at + stop - start]
    return whole


def resized(stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor in another shape of as many axes: what it lacks is zeros, what is too much is left out."""
    if tuple(stored.shape) == shape:
        return stored
    other = stored.new_zeros(shape)
    common = tuple(slice(0, min(pair)) for pair in zip(stored.shape, shape, strict=True))
    other[common] = stored[common]
    return other


def is_whole(spans: Sequence[Span], rows: int) -> bool:
    """Whether spans say that a module's rows are those of the stored tensor, in order; none say so as well."""
    return not spans or tuple(spans) == ((0, rows, 0),)


def overlaps(spans: Sequence[Span], first: int, last: int) -> Iterator[Span]:
    """Those parts of spans that lie in the stored rows ``first`` to ``last``, with places counted from ``first``."""
    for start, stop, at in spans:
        low, high = max(at, first), min(at + stop - start, last)
        if low < high:
            yield start + low - at, start + high - at, low - first
