"""The difference of one weight between two checkpoints.

The subtraction is done in float32 after upcasting each side (float64 where a side is stored so), so that nothing
is rounded that the store dtypes did not round already; two floats of like size are subtracted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from loratools.errors import NonFiniteError
from loratools.io import base as io_base
from loratools.io._load import Room
from loratools.io.base import Weight
from loratools.maths import float8
from loratools.maths.squares import square_of
from loratools.ops._changes import Piece

if TYPE_CHECKING:
    from loratools.ops._extract_tensor import Job

# Values that are subtracted at a time.
_PIECE = 1 << 18
# A difference this many times the rounding of its sides is told apart from it.
_MEANINGFUL = 16.0
_base_room, _tuned_room, _room = Room(), Room(), Room()


class Difference(NamedTuple):
    """tuned − base of one weight.

    Attributes:
        matrix: (out, in·kh·kw) float32.
        norm: ‖matrix‖, Frobenius.
        noise: The norm of what in it is rounding of the stored weights; 0 where that is not known.
    """

    matrix: torch.Tensor
    norm: float
    noise: float


def difference(job: Job, *, reuse: bool = False) -> Difference | None:
    """tuned − base; None where the bytes are the same.

    Args:
        job: What is compared.
        reuse: Whether the matrix may lie in memory that the same thread's next difference takes again.

    Raises:
        NonFiniteError: NaN or Inf in one of the checkpoints.
    """
    if not is_plain(job):
        found = _whole(job)
    elif _same_sides(job):
        return None
    else:
        count = math.prod(job.shape)
        flat = _room.of(4 * count).view(torch.float32) if reuse else torch.empty(count)
        found = _by_pieces(job, flat)
    if found is not None and not math.isfinite(found.norm):
        raise _nonfinite(job)
    return found


def distance(job: Job) -> float:
    """‖tuned − base‖, Frobenius; 0 where the bytes are the same. Of a plain job it is never whole in memory.

    Raises:
        NonFiniteError: NaN or Inf in one of the checkpoints.
    """
    if not is_plain(job):
        found = difference(job, reuse=True)
        return 0.0 if found is None else found.norm
    norm = 0.0 if _same_sides(job) else math.sqrt(_sums(job, None)[0])
    if not math.isfinite(norm):
        raise _nonfinite(job)
    return norm


def is_plain(job: Job) -> bool:
    """Whether both sides are stored alike and in one piece each, so that they can be read a little at a time."""
    piece = job.tuned[0]
    sides = (job.base, piece)
    size = math.prod(job.shape)
    return (
        len(job.tuned) == 1
        and piece.spans == job.base.spans
        and job.rows == job.shape[0]
        and all(math.prod(side.weight.shape) == size > 0 for side in sides)
        and not any(side.scale is not None or side.turned for side in sides)
        and not any(side.weight.start is None or side.weight.dtype == "F64" for side in sides)
    )


def _sides(job: Job) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """A little of both sides of a plain job at a time, the tuned one first, with where it lies among all values."""
    count = math.prod(job.shape)
    base, tuned = (side.weight._replace(shape=(count,)) for side in (job.base, job.tuned[0]))
    for start in range(0, count, _PIECE):
        stop = min(start + _PIECE, count)
        one = io_base.load_rows(tuned, start, stop, _tuned_room)
        yield start, stop, one, io_base.load_rows(base, start, stop, _base_room)


def _same_sides(job: Job) -> bool:
    """Whether both sides of a plain job are the same bytes."""
    if job.base.weight.dtype != job.tuned[0].weight.dtype:
        return False
    return all(_same_bytes(one, other) for _, _, one, other in _sides(job))


def _by_pieces(job: Job, flat: torch.Tensor) -> Difference:
    """The difference of two plain tensors: neither side is ever whole in memory, and pieces stay in the cache."""
    energy, rounding = _sums(job, flat)
    norm = math.sqrt(energy) if energy >= 0.0 else math.nan
    return Difference(flat.reshape(job.matrix), norm, _meaningful(2.0**-24 * math.sqrt(rounding), norm))


def _sums(job: Job, flat: torch.Tensor | None) -> tuple[float, float]:
    """‖tuned − base‖² of a plain job, and ‖base‖² of one in float32, 0 of others.

    Args:
        job: What is compared.
        flat: Takes the difference, (values,) float32; None where nobody wants it.
    """
    energy = rounding = 0.0
    least = torch.empty(min(_PIECE, math.prod(job.shape))) if flat is None else flat
    for start, stop, one, other in _sides(job):
        wide = other.float()
        at = 0 if flat is None else start
        part = least[at : at + stop - start].copy_(one).sub_(wide)
        energy += square_of(part)
        rounding += square_of(wide) if job.base.weight.dtype == "F32" else 0.0
    return energy, rounding


def _whole(job: Job) -> Difference | None:
    """The difference of any two sides."""
    base = io_base.load(job.base.weight)
    alike = len(job.tuned) == 1 and _is_alike(job, job.tuned[0])
    if alike:
        tuned = io_base.load(job.tuned[0].weight)
        if tuned.dtype == base.dtype and _same_bytes(tuned, base):
            return None
        parts = _subtracted(tuned.reshape(base.shape), base)
    else:
        wide = _upcast(base, job.base).reshape(job.matrix)
        parts = _subtracted(_assembled(job, wide), wide)
    matrix = parts.reshape(job.matrix)
    norm = norm_of(matrix)
    noise = 2.0**-24 * norm_of(base) if base.dtype == torch.float32 else 0.0
    return Difference(matrix, norm, _meaningful(noise, norm))


def _meaningful(noise: float, norm: float) -> float:
    """‖what storing float32 has rounded away‖, at most; 0 where it is not known to be small against the difference.

    A checkpoint that an adapter was merged into in float32 differs by the adapter and by half a unit in the last place
    of every weight, at most: by a matrix of full rank that says nothing. Narrower dtypes round as much as training
    changes, and there nothing tells the one from the other.
    """
    return noise if norm > _MEANINGFUL * noise else 0.0


def _is_alike(job: Job, piece: Piece) -> bool:
    """Whether a piece is stored just as the base's tensor is, so that their bytes can be compared."""
    size = math.prod(job.shape)
    whole = (
        piece.spans == job.base.spans and math.prod(piece.weight.shape) == size and job.rows == job.shape[0]
    )
    scaled = piece.scale is not None or job.base.scale is not None
    return whole and not scaled and not piece.turned and not job.base.turned


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    first, second = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(first, second)


def _subtracted(tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The difference in float32, or first in float64 where a side is stored so."""
    exact = torch.float64 if torch.float64 in (tuned.dtype, base.dtype) else torch.float32
    own = tuned.dtype == exact and tuned is not base
    result = tuned if own else tuned.to(exact)
    if not result.ndim:
        return result.sub_(base).float()
    # A few rows at a time: the base is never whole in the wider dtype, and what is upcast stays in the cache.
    height = max(1, _PIECE * len(result) // max(1, result.numel()))
    for rows, other in zip(torch.split(result, height), torch.split(base, height), strict=True):
        rows.sub_(other.to(exact))
    return result.float()


def _upcast(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Values of a stored tensor as (out, in, …) in float32, or float64 where it is stored so."""
    if piece.scale is not None:
        tensor = float8.dequantise(tensor, io_base.load(piece.scale))
    elif tensor.dtype != torch.float64:
        tensor = tensor.float()
    return tensor.t() if piece.turned else tensor


def _assembled(job: Job, like: torch.Tensor) -> torch.Tensor:
    """The tuned rows of the base's weight, put together; rows that the tuned checkpoint lacks are the base's."""
    if is_one_piece(job):  # which need not be put into anything
        (piece,) = job.tuned
        return _upcast(io_base.load(piece.weight), piece).reshape(job.matrix).to(like.dtype)
    whole = like.clone()
    for piece in job.tuned:
        for (start, stop, _), values in zip(piece.spans, _rows(piece), strict=True):
            whole[start:stop] = values.reshape(stop - start, -1)
    return whole


def is_one_piece(job: Job) -> bool:
    """Whether the tuned checkpoint has the base's weight as one tensor, row for row."""
    (piece, *others) = job.tuned
    rows = job.shape[0]
    whole = math.prod(piece.weight.shape) == math.prod(job.shape)
    return not others and whole and tuple(piece.spans) == ((0, rows, 0),)


def _rows(piece: Piece) -> Iterator[torch.Tensor]:
    """The rows of each of a piece's spans; no others are read where they lie together in the file."""
    if piece.turned or piece.scale is not None or not piece.weight.shape:
        values = _upcast(io_base.load(piece.weight), piece)
        yield from (values[at : at + stop - start] for start, stop, at in piece.spans)
        return
    for start, stop, at in piece.spans:
        yield _upcast(io_base.load_rows(piece.weight, at, at + stop - start), piece)


def _nonfinite(job: Job) -> NonFiniteError:
    """The error for a difference that is not finite: it names the tensor at fault."""
    for piece in (job.base, *job.tuned):
        values = _upcast(io_base.load(piece.weight), piece)
        count = int((~torch.isfinite(values)).sum())
        if count:
            return NonFiniteError(
                f"{count} of {values.numel()} values are NaN or infinite",
                path=piece.weight.file,
                keys=[piece.weight.key],
                expected="Finite weights were expected",
                todo="The checkpoint is damaged, or its training diverged; --exclude leaves the weight out",
            )
    return NonFiniteError(
        "the difference is too large for float32", path=job.base.weight.file, keys=[job.base.weight.key]
    )


def norm_of(matrix: torch.Tensor) -> float:
    """‖matrix‖, Frobenius, summed in float64."""
    return math.sqrt(square_of(matrix))


def unlike(base: Weight, tuned: Weight) -> float:
    """‖tuned − base‖ of two tensors of any dtype and one shape; 0 where their bytes are the same."""
    one, other = io_base.load(base), io_base.load(tuned)
    if one.dtype == other.dtype and _same_bytes(one, other):
        return 0.0
    return norm_of((other.double() - one.double()).reshape(-1))
