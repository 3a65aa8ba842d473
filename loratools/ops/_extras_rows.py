"""Tensors that several adapters hold in full, made one: row by row, a slice at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from loratools.ops import _bits
from loratools.tensors import DTYPES, TensorRef, from_torch

REFUSE, FIRST, AVERAGE, SUM = "refuse", "first", "average", "sum"
WAYS = (REFUSE, FIRST, AVERAGE, SUM)

_SLICE = 1 << 20  # elements


class Holding(NamedTuple):
    """What one input holds of a tensor.

    Attributes:
        number: The input's position.
        weight: What the merge multiplies it by.
        ref: The tensor.
        rows: For each row of the result the row of ``ref`` that it is, or -1; None where they are the same.
    """

    number: int
    weight: float
    ref: TensorRef
    rows: tuple[int, ...] | None = None


class Made(NamedTuple):
    """One tensor of several.

    Attributes:
        ref: The tensor, without a name.
        differ: Whether inputs have other values in the same row, where that is refused.
        cancelled: Whether there is a row of which the weights to be averaged by add up to nothing.
    """

    ref: TensorRef
    differ: bool = False
    cancelled: bool = False


def alike(held: Sequence[Holding]) -> bool:
    """Whether all inputs hold the very same tensor."""
    first = held[0]
    return all(each.rows == first.rows and _bits.same_bits(each.ref, first.ref) for each in held[1:])


def made(held: Sequence[Holding], way: str, base: torch.Tensor | None = None) -> Made:
    """One tensor of those that inputs hold.

    Args:
        held: At least one; of one shape but for the rows.
        way: "first": each row from the first input that has it. "refuse": the same, if those that have it agree.
            "average": Σ w·M / Σ w over those that have it. "sum": W + Σ w·(M − W), and the average of rows that the
            base does not have.
        base: W in the result's rows, or the first of them; for "sum".
    """
    shape = held[0].ref.shape or (1,)
    height = shape[0] if held[0].rows is None else len(held[0].rows)
    dtype = _dtype(held)
    result = torch.empty((height, *shape[1:]), dtype=getattr(torch, DTYPES[dtype].torch))
    step = max(1, _SLICE // max(1, result[:1].numel()))
    differ = cancelled = False
    loaded = [each.ref.load().reshape(each.ref.shape or (1,)) for each in held]
    for start in range(0, height, step):
        stop = min(start + step, height)
        parts = [_part(each, tensor, start, stop) for each, tensor in zip(held, loaded, strict=True)]
        weights = [each.weight for each in held]
        if way in (FIRST, REFUSE):
            values, other = _first(parts)
            differ = differ or (other and way == REFUSE)
        else:
            own = base[start:stop].to(torch.float64) if way == SUM and base is not None else None
            values, nothing = _mixed(parts, weights, own)
            cancelled = cancelled or nothing
        result[start:stop] = (values if result.is_floating_point() else values.round()).to(result.dtype)
    return Made(from_torch("", result.reshape(()) if not held[0].ref.shape else result), differ, cancelled)


def _dtype(held: Sequence[Holding]) -> str:
    found = {each.ref.dtype for each in held}
    if len(found) == 1:
        return found.pop()
    return "F64" if "F64" in found else "F32"


class _Part(NamedTuple):
    """Some rows of the result as an input has them: values (rows, …), and which of them it has (rows,)."""

    values: torch.Tensor
    has: torch.Tensor


def _part(each: Holding, tensor: torch.Tensor, start: int, stop: int) -> _Part:
    if each.rows is None:
        return _Part(tensor[start:stop].to(torch.float64), torch.ones(stop - start, dtype=torch.bool))
    rows = torch.tensor(each.rows[start:stop])
    # Rows that it lacks are read as some other, and masked.
    return _Part(tensor[rows.clamp(min=0)].to(torch.float64), rows >= 0)


def _first(parts: Sequence[_Part]) -> tuple[torch.Tensor, bool]:
    values, has = torch.zeros_like(parts[0].values), torch.zeros_like(parts[0].has)
    differ = False
    for part in parts:
        both = has & part.has
        differ = differ or not torch.equal(values[both], part.values[both])
        new = part.has & ~has
        values[new] = part.values[new]
        has |= part.has
    return values, differ


def _mixed(
    parts: Sequence[_Part], weights: Sequence[float], base: torch.Tensor | None
) -> tuple[torch.Tensor, bool]:
    """The weighted average; of rows that the base has, the base and the weighted differences from it."""
    known = 0 if base is None else len(base)
    shape = (-1, *(1 for _ in parts[0].values.shape[1:]))
    total = torch.zeros_like(parts[0].values)
    share = torch.zeros(len(total), dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        factor = part.has.to(torch.float64) * weight
        values = part.values
        if base is not None:
            values = torch.cat([values[:known] - base, values[known:]])
        total += torch.where(part.has.reshape(shape), values, 0.0) * factor.reshape(shape)
        share += factor
    if base is not None:
        total[:known] += base
    rest = share[known:]
    lacking = torch.stack([part.has[known:] for part in parts]).any(dim=0) & (rest == 0)
    total[known:] /= torch.where(rest == 0, 1.0, rest).reshape(shape)
    return total, bool(lacking.any())
