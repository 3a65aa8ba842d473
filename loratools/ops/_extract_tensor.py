"""The arithmetic of an extraction on one tensor: read both sides, subtract, decompose, store.

The subtraction is done in float32 after upcasting each side (float64 where a side is stored so), so that nothing
is rounded that the store dtypes did not round already; two floats of like size are subtracted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from loratools.errors import NonFiniteError
from loratools.io import base as io_base
from loratools.io.base import Weight
from loratools.maths import float8
from loratools.maths.rank import Rule
from loratools.maths.squares import square_of
from loratools.maths.svd import Decomposed, decompose
from loratools.ops._changes import Piece
from loratools.tensors import DTYPES

Shape = tuple[int, ...]

FACTORS, FULL, NORM = "factors", "full", "norm"

# Values that are subtracted at a time.
_SUBTRACTED = 1 << 18
# A difference this many times the rounding of its sides is told apart from it.
_MEANINGFUL = 16.0


class Job(NamedTuple):
    """One tensor to be compared: plain values, so that it can be done anywhere.

    Attributes:
        number: Its place among all jobs.
        name: Its key in the base, for messages.
        base: The tensor of the base.
        tuned: The tensors that hold its rows in the tuned checkpoint.
        shape: Of the base's weight, (out, in[, kh, kw]), or (vocabulary, dim) of an embedding.
        rows: How many of its rows are compared; the difference of the others is 0.
        task: "factors", "full" (the difference itself), or "norm" (only how large it is).
        rule: Of the rank.
        method: "auto", "exact" or "randomized".
        tolerance: See ``decompose``.
        seed: Of random starts.
        store: The store dtype of what is returned, a safetensors name.
    """

    number: int
    name: str
    base: Piece
    tuned: tuple[Piece, ...]
    shape: Shape
    rows: int
    task: str = NORM
    rule: Rule | None = None
    method: str = "auto"
    tolerance: float = 1e-3
    seed: int = 0
    store: str = "F32"

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of the difference with its kernel flattened."""
        return self.shape[0], math.prod(self.shape[1:])


class Found(NamedTuple):
    """What became of one job.

    Attributes:
        number: Its job's.
        norm: ‖difference‖, Frobenius; 0 where the tensors do not differ.
        up: (rank, out): U·√σ, transposed, so that its first rows are a smaller rank's.
        down: (rank, in·kh·kw): √σ·Vᵀ.
        full: The difference itself.
        sigma: The singular values that are kept, descending.
        lost: ‖difference − extracted‖².
        gap: How much of that a matrix of this rank may capture at best.
        method: "exact", "randomized" or "full".
        tiny: Whether the factors lie below the store dtype's normal numbers.
    """

    number: int
    norm: float = 0.0
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    full: torch.Tensor | None = None
    sigma: tuple[float, ...] = ()
    lost: float = 0.0
    gap: float = 0.0
    method: str = "full"
    tiny: bool = False

    @property
    def energy(self) -> float:
        """‖difference‖²."""
        return self.norm * self.norm


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


def extract_tensor(job: Job) -> Found:
    """Everything that is to be done for one job, on the CPU.

    Raises:
        NonFiniteError: NaN or Inf in one of the checkpoints; file and key are named.
    """
    found = difference(job)
    if found is None:
        return Found(job.number)
    matrix, norm, noise = found
    if not norm or job.task == NORM:
        return Found(job.number, norm)
    if job.task == FULL:
        full = stored(matrix, job.store, job.name).reshape(job.shape)
        return Found(job.number, norm, full=full)
    rule = job.rule or Rule("rank", 1)
    decomposed = decompose(
        matrix, rule, method=job.method, tolerance=job.tolerance, seed=job.seed, noise=noise
    )
    return factored(job, decomposed)


def difference(job: Job) -> Difference | None:
    """tuned − base; None where the bytes are the same.

    Raises:
        NonFiniteError: NaN or Inf in one of the checkpoints.
    """
    base = io_base.load(job.base.weight)
    if len(job.tuned) == 1 and _is_plain(job, job.tuned[0]):
        tuned = io_base.load(job.tuned[0].weight)
        if tuned.dtype == base.dtype and _same_bytes(tuned, base):
            return None
        parts = _subtracted(tuned.reshape(base.shape), base)
    else:
        wide = _upcast(base, job.base)
        parts = _subtracted(_assembled(job, wide), wide.reshape(job.matrix))
    matrix = parts.reshape(job.matrix)
    norm = norm_of(matrix)
    if not math.isfinite(norm):
        raise _nonfinite(job)
    return Difference(matrix, norm, _rounding(base, norm))


def _rounding(base: torch.Tensor, norm: float) -> float:
    """‖what storing float32 has rounded away‖, at most; 0 where it is not known to be small against the difference.

    A checkpoint that an adapter was merged into in float32 differs by the adapter and by half a unit in the last place
    of every weight, at most: by a matrix of full rank that says nothing. Narrower dtypes round as much as training
    changes, and there nothing tells the one from the other.
    """
    if base.dtype != torch.float32:
        return 0.0
    noise = 2.0**-24 * norm_of(base)
    return noise if norm > _MEANINGFUL * noise else 0.0


def _is_plain(job: Job, piece: Piece) -> bool:
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
    height = max(1, _SUBTRACTED * len(result) // max(1, result.numel()))
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
    whole = like.clone()
    flat = whole.reshape(job.matrix)
    for piece in job.tuned:
        for (start, stop, _), values in zip(piece.spans, _rows(piece), strict=True):
            flat[start:stop] = values.reshape(stop - start, -1)
    return flat


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


def factored(job: Job, found: Decomposed) -> Found:
    """Balanced factors, √σ on both sides, in the store dtype on the CPU."""
    norm = math.sqrt(found.energy)
    if not len(found.sigma):
        return Found(job.number)
    root = found.sigma.to(found.u.device).sqrt().to(found.u.dtype)
    up, down = found.u.t() * root[:, None], root[:, None] * found.vh
    largest = math.sqrt(float(found.sigma[0]) / max(job.matrix))
    return Found(
        job.number,
        norm,
        stored(up, job.store, job.name),
        stored(down, job.store, job.name),
        sigma=tuple(found.sigma.tolist()),
        lost=found.lost,
        gap=found.gap,
        method=found.method,
        tiny=largest < torch.finfo(getattr(torch, DTYPES[job.store].torch)).tiny,
    )


def stored(values: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """Values in a store dtype, contiguous on the CPU.

    Raises:
        NonFiniteError: Some do not fit.
    """
    rounded = values.to(getattr(torch, DTYPES[dtype].torch)).contiguous().cpu()
    if not torch.isfinite(rounded).all():
        raise NonFiniteError(
            f"values up to {float(values.abs().max()):.3g} do not fit {dtype}",
            keys=[name],
            todo="Choose --dtype float32 or bfloat16",
        )
    return rounded


def unlike(base: Weight, tuned: Weight) -> float:
    """‖tuned − base‖ of two tensors of any dtype and one shape; 0 where their bytes are the same."""
    one, other = io_base.load(base), io_base.load(tuned)
    if one.dtype == other.dtype and _same_bytes(one, other):
        return 0.0
    return norm_of((other.double() - one.double()).reshape(-1))
