"""The common case of a verdict, in one pass of float32: what is stored is W + ΔW rounded to nearest.

It only ever says "baked", of tensors of which ``_verify_tensor`` says so of the float64 sums, too, and looks at every
value. Bounds are taken on the safe side; whatever is not within them is left to be measured in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from loratools.errors import NonFiniteError
from loratools.io._load import Room
from loratools.io.base import load
from loratools.ops._assemble import outputs_first
from loratools.ops._bake_tensor import exact_rows
from loratools.ops._verify_tasks import Job

_PIECE = 1 << 17  # values whose squares are summed in float32; the sums are added in float64
_STORED = ("F16", "BF16")  # far enough from float32 that its rounding does not count
_BASES = (*_STORED, "F32")
# ΔW² beside W² from which on T − W has the bits that are reported: one part in a million of the norm is wrong by then.
_LEAST = 2.0**-32
_SMALLEST = 2.0**-80  # of Σ ΔW²: beneath it squares that count may vanish in float32
FLIPPED = (
    1 / 16
)  # ‖Q − N(T)‖² beside ‖N(T) − T‖²: as in ``_verify_tensor``, without what a computation may add
STEPS = 8.0  # likewise
# Memory of each thread for the base's tensor and for the result's, one pair at a time, however they are compared.
BEFORE, AFTER = Room(), Room()


class Nearest(NamedTuple):
    """Sums over all values, with T = W + ΔW, Q what is stored, and N(T) the nearest values of its dtype.

    Attributes:
        base: Σ W².
        delta: Σ ΔW².
        along: Σ (Q − W)·ΔW.
        error: Σ (Q − T)².
        nearest: Σ (N(T) − T)².
        beside: Σ (Q − N(T))².
        changed: How many pieces have a value that is not N(W).
        farthest: The largest abs(Q − T).
        top: The largest abs(T).
    """

    base: float
    delta: float
    along: float
    error: float
    nearest: float
    beside: float
    changed: float
    farthest: float
    top: float


def nearest(job: Job) -> Nearest | None:
    """What is told of a tensor that is W + ΔW rounded to nearest, or None where that is not certain.

    Args:
        job: Which tensor; all of it is looked at.

    Raises:
        LoraError: A file cannot be read, or an adapter does not fit.
    """
    change = job.change
    if job.baked is None or job.baked.dtype not in _STORED or change.weight.dtype not in _BASES:
        return None
    try:
        target = exact_rows(change, precise=False, room=BEFORE)
        if job.baked.shape != target.shape:
            return None
        baked = load(job.baked, AFTER)
        base, stored = (outputs_first(each, target.turned) for each in (target.base, baked))
        pieces = [
            _piece(*each)
            for start, stop, rows in target.rows
            for each in zip(
                *(_split(part) for part in (base[start:stop], rows, stored[start:stop])), strict=True
            )
        ]
    except NonFiniteError:
        return None  # float64 may have room for it, or says what is to blame
    found = _summed(pieces) if pieces else None
    return found if found is not None and _is_certain(found, baked.dtype) else None


def _split(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(rows.reshape(-1), _PIECE)


def _summed(pieces: list[Nearest]) -> Nearest:
    *summed, farthest, top = zip(*pieces, strict=True)
    # Of NaN no order is known: sums alone are sure to show it.
    return Nearest(*map(sum, summed), *map(max, (farthest, top)))


def _piece(base: torch.Tensor, target: torch.Tensor, stored: torch.Tensor) -> Nearest:
    """The sums of some values, (n,) each: W, T in float32 and Q."""
    wide, found = base.to(torch.float32, copy=True), stored.to(torch.float32)
    before = base if base.dtype == stored.dtype else wide.to(stored.dtype)
    changed = not torch.equal(before, stored)
    moved, squares = found - wide, torch.dot(wide, wide)
    delta = torch.sub(target, wide, out=wide)
    error = torch.sub(found, target, out=found)
    sums = [squares, torch.dot(delta, delta), torch.dot(moved, delta), torch.dot(error, error)]
    near = target.to(stored.dtype)
    if torch.equal(near, stored):
        beside = [sums[-1], sums[-1].new_zeros(())]
    else:
        off = near.to(torch.float32).sub_(target)
        beside = [torch.dot(off, off), torch.sub(error, off).square_().sum()]
    farthest, top = (torch.stack(torch.aminmax(each)).abs().max() for each in (error, target))
    told = [*sums, *beside, squares.new_full((), float(changed)), farthest, top]
    return Nearest(*torch.stack(told).tolist())


def _is_certain(found: Nearest, dtype: torch.dtype) -> bool:
    """Whether float64 cannot come to another verdict; never where a sum is not finite."""
    if not found.changed or not all(map(math.isfinite, found)):
        return False
    if found.delta <= max(_LEAST * found.base, _SMALLEST):
        return False
    step = torch.finfo(dtype).eps * 2.0 ** (math.frexp(found.top)[1] - 1)
    return found.beside <= FLIPPED * found.nearest and found.farthest <= STEPS * step
