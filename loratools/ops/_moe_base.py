"""Adapters of experts against a base that stores them otherwise: brought into the style of its tensors, by copying."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from loratools.archs import _experts as names
from loratools.archs._experts import FUSED, SPLIT, SWITCH, Place
from loratools.io.base import Base, Weight
from loratools.kinds import experts
from loratools.model import Adapter, Module
from loratools.ops import _moe, _moe_known, _moe_parts, _moe_told
from loratools.ops._regroup import Step

_WEIGHT = ".weight"


class _Stored(NamedTuple):
    """A tensor of experts in a base."""

    part: str
    weight: Weight
    place: Place


def for_base(adapter: Adapter, base: Base) -> Adapter:
    """The adapter with its experts as the base stores them; as it is where they are so, or the base has none.

    Args:
        adapter: From ``load``.
        base: From :func:`loratools.io.base.keys_of`.

    Raises:
        LoraError: The experts cannot be taken apart or put together.
    """
    if not any(_is_experts(module) for module in adapter.modules.values()):
        return adapter
    stored = list(_stored(base))
    if not stored:
        return adapter
    style = _style_of([each.place for each in stored])
    if _is_so(adapter, style):
        return adapter
    told = _told(adapter, base, stored)
    named = _moe_known.known(adapter, told.total)
    steps = _moe.restyled([Step(module, (module,)) for module in named.modules.values()], style, told)
    for step in steps:
        if step.problem is not None:
            raise step.problem
    modules = [_open(step.module) for step in steps]
    return replace(named, modules={module.target: module for module in modules}, order=())


def _is_experts(module: Module) -> bool:
    return module.kind == experts.KIND.name or names.is_experts(module.target.path)


def _stored(base: Base) -> Iterator[_Stored]:
    """The tensors of a base that hold experts, by their names."""
    for part, weights in base.parts.items():
        for key, weight in weights.items():
            place = names.place(key.removesuffix(_WEIGHT))
            if place is not None:
                yield _Stored(part, weight, place)


def _style_of(places: list[Place]) -> str:
    if any(place.number is not None for place in places):
        return SPLIT
    return FUSED if any(place.role == "gate_up" for place in places) else SWITCH


def _is_so(adapter: Adapter, style: str) -> bool:
    """Whether nothing of an adapter's experts is in another style; packed ones find their parameters by themselves."""
    if any(_moe_known.is_packed(module) for module in adapter.modules.values()):
        return style == FUSED and all(place.number is None for place in _places(adapter))
    singles = [place.number is not None for place in _places(adapter)]
    joined = [place.role == "gate_up" for place in _places(adapter) if place.role != "down"]
    return (
        all(singles)
        if style == SPLIT
        else not any(singles) and all(each == (style == FUSED) for each in joined)
    )


def _places(adapter: Adapter) -> list[Place]:
    return [place for target in adapter.modules if (place := names.place(target.path)) is not None]


def _told(adapter: Adapter, base: Base, stored: list[_Stored]) -> _moe_told.About:
    """What the base says of its experts: its configuration, or else its tensors' names; and their number."""
    told = _moe_told.about(adapter, base.configs.get(stored[0].part) or {})
    whole = [each.weight.shape[0] for each in stored if each.place.number is None and each.weight.shape]
    highest = max((each.place.number for each in stored if each.place.number is not None), default=-1)
    count = whole[0] if whole else highest + 1
    return _moe_told.settled(told, [each.place for each in stored])._replace(total=count)


def _open(module: Module) -> Module:
    known = module.kind == experts.KIND.name and experts.count(module) is not None
    return _moe_parts.unpacked(module) if known else module
