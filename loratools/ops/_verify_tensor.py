"""Whether one tensor of a checkpoint is what a bake makes of it: W + ΔW, rounded to the store dtype in any fair way.

With T = W + ΔW in float64, Q what is stored, N(T) the nearest values of its dtype, and s the step between neighbours
of that dtype at each value, whose two distances to T are a and s − a:

- rounding to nearest gives N(T). A float32 computation before it moves values next to the middle of a step to the
  other side, a share of about 2⁻¹⁰ of them in float16 and less in fewer bits: ‖Q − N(T)‖ stays well under a quarter of
  ‖N(T) − T‖. In float32 itself it is a few units in the last place of W.
- stochastic rounding has the variance Σ a(s − a) around T; by Bernstein's inequality ‖Q − T‖² exceeds it by no more
  than 6·max(s)·sqrt(Σ a(s − a)) + 36·max(s)², and ⟨Q − T, ΔW⟩ has the variance Σ ΔW²·a(s − a) around 0. Compensated
  rounding is no farther away, up to a factor that 2 covers, and leaves nothing of ⟨Q − T, ΔW⟩.

Either is "baked"; so is a ΔW that was itself rounded to bfloat16 on the way (2⁻⁹ of it), as other tools do. Beyond that
no single value may be more than 8 of the largest steps off, so that one damaged value does not hide among millions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from loratools.io._load import Room
from loratools.io.base import Weight, load
from loratools.ops._assemble import outputs_first
from loratools.ops._bake_tensor import Exact, exact_rows
from loratools.ops._verify_nearest import AFTER, BEFORE, FLIPPED, STEPS, Nearest, nearest
from loratools.ops._verify_tasks import ABSENT, BAKED, LOST, NOT_BAKED, PARTLY, WRONG, Job
from loratools.ops.checkpoint_results import VerifiedTensor
from loratools.tensors import DTYPES

FAR_OFF = "some of its values are far off"

BLOCK = 1 << 18  # elements worked on at a time
_FLOAT32 = 16 * 2.0**-24  # a few roundings of a float32 computation, relative to ‖W‖ + ‖ΔW‖
_OTHER_TOOLS = 2.0**-9  # ΔW rounded to bfloat16 once
_FARTHER = 4.0  # twice as far, squared
_SIGMAS = 6.0
# Of float64: the bias of its exponent, the bits behind it, and its own.
_BIAS, _FRACTION, _EXPONENT = 1023, 52, 0x7FF
_CHANCE = -20.0  # the logarithm of what is taken for impossible


class Stored(NamedTuple):
    """A tensor as it is stored.

    Attributes:
        data: In the store dtype.
        scale: What each value is multiplied by, of the same shape; None for 1.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None

    def block(self, start: int) -> torch.Tensor:
        """Some values in float64, as one axis."""
        found = self.data.reshape(-1)[start : start + BLOCK].to(torch.float64)
        return found if self.scale is None else found * self.units(start)

    def rows(self, start: int, stop: int) -> Stored:
        """Some of its rows."""
        return Stored(self.data[start:stop], None if self.scale is None else self.scale[start:stop])

    def outputs_first(self, turned: bool) -> Stored:
        """The same with its outputs on the first axis; a single number as a vector.

        Args:
            turned: Whether it is stored as (in, out).
        """
        scale = None if self.scale is None else outputs_first(self.scale, turned)
        return Stored(outputs_first(self.data, turned), scale)

    def units(self, start: int) -> torch.Tensor | float:
        """Their scales in float64."""
        if self.scale is None:
            return 1.0
        return self.scale.reshape(-1)[start : start + BLOCK].to(torch.float64)


class Sums(NamedTuple):
    """What the verdict rests on: sums over all values, or the largest of them.

    Attributes:
        base: Σ W².
        delta: Σ ΔW².
        along: Σ (Q − W)·ΔW.
        moved: Σ (Q − W)².
        error: Σ (Q − T)².
        nearest: Σ (N(T) − T)².
        beside: Σ (Q − N(T))².
        spread: Σ a(s − a), the variance of stochastic rounding.
        wobble: Σ ΔW²·a(s − a).
        unchanged: How many values of N(W) are not Q's.
        visible: How many values of N(W) are not N(T)'s.
        chance: The logarithm of the chance that stochastic rounding gives N(W), where ``unchanged`` is 0.
        step: max s.
        farthest: The largest abs(Q − T).
        largest: The largest abs(ΔW).
    """

    base: float
    delta: float
    along: float
    moved: float
    error: float
    nearest: float
    beside: float
    spread: float
    wobble: float
    unchanged: float
    visible: float
    chance: float
    step: float
    farthest: float
    largest: float


def stored(weight: Weight, scale: Weight | None, room: Room | None = None) -> Stored:
    """A tensor and its scales, read whole; the tensor into memory that is used again, where that is given."""
    data = load(weight, room)
    if scale is None:
        return Stored(data)
    from loratools.maths import float8

    return Stored(data, float8.spread(load(scale), data.shape).expand(data.shape).contiguous())


def verify_tensor(job: Job) -> VerifiedTensor:
    """Compare one tensor with what it should be; memory is a few times its own size."""
    change = job.change
    found = VerifiedTensor(job.key, change.target, change.component, ABSENT, 0.0, None, None, None, "")
    sure = nearest(job)
    if sure is not None and job.baked is not None:
        return _told(found._replace(verdict=BAKED, dtype=job.baked.dtype), sure)
    target = exact_rows(change, room=BEFORE)
    base = Stored(target.base) if change.scale is None else stored(change.weight, change.scale)
    if change.weight.shape != target.shape:
        base = Stored(torch.zeros(()).expand(target.shape))  # all is new: a vocabulary of another size
    if job.baked is None:
        return found._replace(norm=math.sqrt(_by_rows(base, target, base).delta))
    found = found._replace(verdict=WRONG, dtype=job.baked.dtype)
    if job.baked.shape != target.shape or not DTYPES[job.baked.dtype].floating:
        stands = f"{job.baked.dtype} of shape {list(job.baked.shape)}"
        return found._replace(note=f"it is {stands}, not of shape {list(target.shape)}")
    sums = _by_rows(base, target, stored(job.baked, job.scale, AFTER))
    if not math.isfinite(sums.error):
        return found._replace(norm=math.sqrt(sums.delta), note="it holds NaN or Inf")
    return _judged(found, sums)


def _by_rows(base: Stored, target: Exact, baked: Stored) -> Sums:
    """``measure`` without ever holding the whole of T."""
    base, baked = base.outputs_first(target.turned), baked.outputs_first(target.turned)
    blocks: list[torch.Tensor] = []
    for start, stop, rows in target.rows:
        blocks += _blocks(base.rows(start, stop), rows, baked.rows(start, stop))
    return _summed(blocks)


def measure(base: Stored, target: torch.Tensor, baked: Stored) -> Sums:
    """Everything that the verdict rests on, block by block.

    Args:
        base: W.
        target: T, float64, of the same shape.
        baked: Q, of the same shape.
    """
    return _summed(_blocks(base, target, baked))


def _blocks(base: Stored, target: torch.Tensor, baked: Stored) -> list[torch.Tensor]:
    """The fields of ``Sums`` for each block of values."""
    flat = target.reshape(-1)
    recast = base.data.dtype != baked.data.dtype or base.scale is not None or baked.scale is not None
    return [
        _block(base.block(start), flat[start : start + BLOCK], baked, start, recast)
        for start in range(0, flat.numel(), BLOCK)
    ]


def _summed(blocks: list[torch.Tensor]) -> Sums:
    if not blocks:
        return Sums(*(0.0,) * len(Sums._fields))
    *summed, step, farthest, largest = torch.stack(blocks).T
    return Sums(
        *(float(each.sum()) for each in summed), *(float(each.max()) for each in (step, farthest, largest))
    )


def _block(base: torch.Tensor, target: torch.Tensor, baked: Stored, start: int, recast: bool) -> torch.Tensor:
    """The fields of ``Sums`` for some values, float64; ``recast`` is whether N(W) can differ from W."""
    unit, dtype, found = baked.units(start), baked.data.dtype, baked.block(start)
    delta, moved, error = target - base, found - base, found - target
    near, step = (each * unit for each in grid(target / unit, dtype))
    before = grid(base / unit, dtype)[0] * unit if recast else base
    off = (near - target).abs()
    variance = off * (step - off).clamp(min=0)
    unchanged = (found != before).sum().double()
    # Of no interest once a value has changed, and the slowest of all.
    chance = unchanged if unchanged else torch.log1p(-(delta.abs() / step).clamp(max=1)).sum()
    return torch.stack(
        [
            base @ base,
            delta @ delta,
            moved @ delta,
            moved @ moved,
            error @ error,
            off @ off,
            (found - near).square().sum(),
            variance.sum(),
            variance @ delta.square(),
            unchanged,
            (near != before).sum().double(),
            chance,
            step.max(),
            error.abs().max(),
            delta.abs().max(),
        ]
    )


def grid(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest values of a dtype, ties to even, and the steps between its neighbours there; both in float64.

    Unlike a cast this rounds once, and does not saturate.
    """
    info = torch.finfo(dtype)
    bits = 1 - round(math.log2(info.eps))
    lowest = max(round(math.log2(info.smallest_normal)) + 1, bits + 1 - _BIAS)
    # Exponents and powers of two by their bits: torch.frexp is slow and takes that of 0 for 0, and torch.ldexp computes
    # in float32.
    exponent = (values.view(torch.int64) >> _FRACTION).bitwise_and_(_EXPONENT).clamp_(min=lowest - 1 + _BIAS)
    step = exponent.add_(1 - bits).bitwise_left_shift_(_FRACTION).view(torch.float64)
    return (values / step).round_().mul_(step), step


def _judged(found: VerifiedTensor, sums: Sums) -> VerifiedTensor:
    if not sums.delta:
        verdict = WRONG if sums.beside else BAKED
        return found._replace(verdict=verdict, note="it should not have changed" if sums.beside else "")
    kept = sums.along / sums.delta
    found = _told(found, sums)
    if not sums.unchanged:
        # What nearest rounding would not show, or chance may well have left as it was.
        hidden = not sums.visible or sums.chance > _CHANCE
        return found._replace(verdict=BAKED, note=LOST) if hidden else found._replace(verdict=NOT_BAKED)
    damaged = sums.farthest > STEPS * sums.step + sums.largest / 64
    if _is_baked(sums, kept) and not damaged:
        return found._replace(verdict=BAKED)
    if _is_whole(sums, kept):
        return found._replace(note=FAR_OFF if damaged else "the change is there, and something else, too")
    if _is_along(sums, kept):
        return found._replace(verdict=PARTLY, strength=kept)
    return found._replace(verdict=PARTLY if sums.error < sums.delta else WRONG)


def _told(found: VerifiedTensor, sums: Sums | Nearest) -> VerifiedTensor:
    norm = math.sqrt(sums.delta)
    return found._replace(
        norm=norm,
        kept=sums.along / sums.delta,
        error=math.sqrt(sums.error) / norm,
        rounding=math.sqrt(sums.nearest) / norm,
    )


def _computed(sums: Sums) -> float:
    """‖·‖² of what the computation before rounding may have added."""
    float32 = _FLOAT32 * (math.sqrt(sums.base) + math.sqrt(sums.delta))
    return float32**2 + _OTHER_TOOLS**2 * sums.delta


def _within_rounding(sums: Sums) -> float:
    """The largest ‖Q − T‖² of stochastic or compensated rounding."""
    spread = math.sqrt(sums.spread)
    tail = _SIGMAS * sums.step * spread + (_SIGMAS * sums.step) ** 2
    return _FARTHER * max(sums.nearest, sums.spread) + tail + _computed(sums)


def _deviation(sums: Sums) -> float:
    """How far rounding may move ``kept`` from what it is of T."""
    return _SIGMAS * math.sqrt(sums.wobble) / sums.delta + 2 * _OTHER_TOOLS


def _is_baked(sums: Sums, kept: float) -> bool:
    if sums.beside <= FLIPPED * sums.nearest + _computed(sums):
        return True
    return sums.error <= _within_rounding(sums) and _is_whole(sums, kept)


def _is_whole(sums: Sums, kept: float) -> bool:
    return abs(kept - 1.0) <= _deviation(sums)


def _is_along(sums: Sums, kept: float) -> bool:
    """Whether Q − W is ΔW times another strength, but for rounding."""
    rest = sums.moved - sums.along**2 / sums.delta
    return rest <= _within_rounding(sums) and abs(kept) > _deviation(sums)
