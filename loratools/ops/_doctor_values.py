"""Checks of the values: NaN and Inf, zeros, what float16 cannot hold. One tensor at a time, in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy

from loratools.model import Module
from loratools.ops._doctor_case import Case
from loratools.ops.doctor_results import ERROR, WARNING, Finding, named
from loratools.tensors import DTYPES, TensorRef

_BLOCK = 1 << 20  # elements
_HALF = float(numpy.finfo(numpy.float16).max)
# Factors of which ΔW is a multiple: where one is zero, so is ΔW.
_FACTORS = frozenset(
    (
        *("up", "down", "mid", "lora_E", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    )
)
_BESIDE = frozenset({"diff", "diff_b", "up_bias", "bias_values"})


class Measured(NamedTuple):
    """What the values of one tensor are.

    Attributes:
        finite: Whether all are.
        largest: The largest magnitude of those that are.
    """

    finite: bool
    largest: float


def measure(ref: TensorRef) -> Measured:
    """What the values of a tensor are, in blocks, so that no copy of it is held."""
    # As it lies in the file: the transpose would have to be copied to be flat.
    stored = ref.flipped() if ref.transposed else ref
    values = stored.numpy(widen=False).reshape(-1)
    finite, largest = True, 0.0
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        if ref.dtype == "BF16":  # its bits are the upper half of a float32's
            block = (block.astype(numpy.uint32) << 16).view(numpy.float32)
        good = numpy.isfinite(block)
        if not good.all():
            finite, block = False, block[good]
        if len(block):
            largest = max(largest, float(block.max()), -float(block.min()))
    return Measured(finite, largest)


def check(case: Case) -> Iterator[Finding]:
    """All that the values tell, from one pass over them."""
    bad: list[str] = []
    zero: list[str] = []
    large: list[str] = []
    for module in case.modules:
        found = {role: measure(ref) for role, ref in module.tensors() if _is_measured(ref)}
        names = {role: ref.name or f"{module.target} ({role})" for role, ref in module.tensors()}
        bad += [names[role] for role, each in found.items() if not each.finite]
        large += [names[role] for role, each in found.items() if _overflows(module, role, each)]
        if _is_zero(module, found):
            zero.append(str(module.target))
    for key, ref in case.extras.items():
        if _is_measured(ref) and not measure(ref).finite:
            bad.append(key)
    yield from _nonfinite(bad, len(case.tensors))
    yield from _zero(zero, len(case.modules))
    if large:
        yield Finding(
            "overflow",
            WARNING,
            f"{named(large, 'tensor', of=len(case.tensors))} have values, times the scale, beyond {_HALF:g}",
            "They become Inf in a program that computes in float16",
            "Compute in bfloat16 or float32",
            keys=tuple(large),
        )


def _is_measured(ref: TensorRef) -> bool:
    kind = DTYPES[ref.dtype]
    return kind.floating and bool(kind.numpy or kind.torch) and ref.numel > 0


def _overflows(module: Module, role: str, found: Measured) -> bool:
    """Whether float16 cannot hold it; ``up`` is often stored times the scale."""
    factor = abs(module.scale) if role == "up" and math.isfinite(module.scale) else 1.0
    return role != "alpha" and found.largest * max(1.0, factor) > _HALF


def _is_zero(module: Module, found: dict[str, Measured]) -> bool:
    if any(role in _BESIDE and each.largest for role, each in found.items()) or module.magnitude is not None:
        return False
    plain = module.kind == "full" and found.keys() <= {"diff", "diff_b"}
    roles = [role for role in found if role in _FACTORS]
    nothing = any(found[role].finite and not found[role].largest for role in roles)
    return nothing or (plain and bool(found) and not any(each.largest for each in found.values()))


def _nonfinite(keys: list[str], tensors: int) -> Iterator[Finding]:
    if keys:
        yield Finding(
            "nonfinite",
            ERROR,
            f"{named(keys, 'tensor', of=tensors)} hold NaN or Inf",
            "All that the model computes with them becomes NaN: black images, no text",
            "The training has diverged; take an earlier checkpoint of it",
            keys=tuple(keys),
        )


def _zero(targets: list[str], modules: int) -> Iterator[Finding]:
    if targets and len(targets) == modules:
        yield Finding(
            "untrained",
            ERROR,
            f"a factor is zero in all of {modules} modules",
            "It changes nothing: it was saved before any training, or without what was trained",
            "Save it again from where it was trained",
            keys=tuple(targets),
        )
    elif targets:
        yield Finding(
            "zero-modules",
            WARNING,
            f"a factor is zero in {named(targets, 'module', of=modules)}",
            "These modules change nothing; the training did not reach them, or they were padded",
            keys=tuple(targets),
        )
