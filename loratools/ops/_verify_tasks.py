"""Which tensors of a checkpoint are compared with which of its base: from headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from loratools.engine import Item
from loratools.errors import ArchitectureError
from loratools.io.base import Base, Weight
from loratools.ops._changes import Change, Plan
from loratools.ops.checkpoint_results import VerifiedTensor
from loratools.tensors import DTYPES

BAKED, PARTLY, NOT_BAKED, WRONG, ABSENT, UNEXPECTED = (
    "baked",
    "partly",
    "not baked",
    "wrong",
    "absent",
    "unexpected",
)
_WIDE = 8  # bytes of a number of a factor, as it is computed with
_COMPARED = 16.0  # operations on a value beside those that make it: differences, neighbours, sums
_BLOCKS = 64 << 20  # bytes: what is worked on at a time, in float64
LOST = "the store dtype has no room for the change, and nothing of it is there"


class Job(NamedTuple):
    """One tensor that adapters change.

    Attributes:
        change: What they do.
        key: Its name in the result.
        baked: The tensor there, or None.
        scale: The tensor of its float8 scales there, where it has one.
    """

    change: Change
    key: str
    baked: Weight | None
    scale: Weight | None = None


class Kept(NamedTuple):
    """A tensor that no adapter touches.

    Attributes:
        key: Its name in the result.
        weight: In the base.
        baked: In the result, or None.
        scale: The tensor of its float8 scales in the base, where it has one.
        baked_scale: Likewise in the result.
    """

    key: str
    weight: Weight
    baked: Weight | None
    scale: Weight | None = None
    baked_scale: Weight | None = None


Task = Job | Kept


def tasks(base: Base, baked: Base, plan: Plan) -> Iterator[Task]:
    """Every tensor of the base, and those that are added to it.

    Raises:
        ArchitectureError: The result has none of them.
    """
    changes = {(change.part, change.weight.key): change for change in plan.changes}
    # Whether scales are right shows in the weights that they multiply.
    scales = {(change.part, change.scale.key) for change in plan.changes if change.scale is not None}
    known = False
    for part, own in base.parts.items():
        result = _part(base, baked, part)
        known = known or not own.keys().isdisjoint(result)
        dropped = _dropped_scales(own, result)
        for key, weight in own.items():
            change = changes.get((part, key))
            if change is not None:
                yield _job(change, key, result)
            elif (part, key) not in scales and key not in dropped:
                yield _kept_as_is(weight, own, result)
    if not known:
        raise ArchitectureError(
            f"it has none of the {sum(map(len, base.parts.values()))} tensors of {base.path}",
            path=baked.path,
            expected="The base with adapters baked in was expected, with the base's names",
            todo="Check that both are of one model, and spelt alike",
        )
    for added in plan.added:
        result = _part(base, baked, added.part)
        if added.change is not None:
            yield _job(added.change, added.key, result)
        else:
            yield Kept(added.key, added.copied, result.get(added.key))


def _job(change: Change, key: str, result: Mapping[str, Weight]) -> Job:
    weight = result.get(key)
    return Job(change, key, weight, None if weight is None else _scale(result, weight))


def _kept_as_is(weight: Weight, own: Mapping[str, Weight], result: Mapping[str, Weight]) -> Kept:
    found = result.get(weight.key)
    if found is None or found.dtype == weight.dtype:
        return Kept(weight.key, weight, found)
    return Kept(weight.key, weight, found, _scale(own, weight), _scale(result, found))


def _part(base: Base, baked: Base, part: str) -> Mapping[str, Weight]:
    """The result's tensors of one part of the base."""
    if part not in baked.parts and len(base.parts) == len(baked.parts) == 1:
        return next(iter(baked.parts.values()))
    return baked.parts.get(part, {})


def _scale(part: Mapping[str, Weight], weight: Weight) -> Weight | None:
    if not _is_float8(weight):
        return None
    from loratools.ops import _quantised

    return _quantised.scale_of(part, weight)


def _is_float8(weight: Weight) -> bool:
    return DTYPES[weight.dtype].bits == 8 and DTYPES[weight.dtype].floating


def _dropped_scales(own: Mapping[str, Weight], result: Mapping[str, Weight]) -> set[str]:
    """The scales of weights that the result stores as plain numbers."""
    scales = (
        _scale(own, weight)
        for key, weight in own.items()
        if _is_float8(weight) and key in result and not _is_float8(result[key])
    )
    return {scale.key for scale in scales if scale is not None and scale.key not in result}


def item(task: Task) -> Item:
    """What comparing one tensor costs an executor."""
    weights = [each for each in _weights(task) if each is not None]
    stored = sum(weight.nbytes for weight in weights)
    if isinstance(task, Kept):
        name, same = (
            f"{task.weight.file}: {task.key}",
            task.baked is None or task.baked.dtype == task.weight.dtype,
        )
        return Item(name, read=stored, memory=0 if same else _BLOCKS + stored, kind="same")
    numbers = math.prod(task.change.weight.shape)
    modules = [term.module for term in task.change.terms if term.module is not None]
    factors = [ref for module in modules for _, ref in module.tensors()]
    factors += [term.tensor for term in task.change.terms if term.tensor is not None]
    wide = _WIDE * sum(math.prod(ref.shape) for ref in factors)
    return Item(
        f"{task.change.weight.file}: {task.key}",
        read=stored + sum(ref.nbytes for ref in factors),
        memory=_BLOCKS + stored + wide,
        cost=numbers * (_COMPARED + sum(2.0 * (module.rank or 1) for module in modules)),
        kind="verify",
    )


def _weights(task: Task) -> tuple[Weight | None, ...]:
    """All stored tensors that a task reads."""
    if isinstance(task, Job):
        return task.change.weight, task.change.scale, task.baked, task.scale
    return task.weight, task.scale, task.baked, task.baked_scale


def strangers(base: Base, baked: Base, plan: Plan) -> Iterator[VerifiedTensor]:
    """Tensors of the result that neither the base nor the adapters account for."""
    added = {(each.part, each.key) for each in plan.added}
    alone = len(base.parts) == len(baked.parts) == 1
    for part, result in baked.parts.items():
        name = next(iter(base.parts)) if alone else part
        own = base.parts.get(name, {})
        scales = {scale.key for scale in (_scale(result, each) for each in result.values()) if scale}
        for key, weight in result.items():
            if key not in own and (name, key) not in added and key not in scales:
                yield unexpected(key, weight.dtype, "the base has no such tensor")


def unexpected(key: str, dtype: str, note: str) -> VerifiedTensor:
    return VerifiedTensor(key, "", "", UNEXPECTED, 0.0, None, None, None, dtype, note=note)
