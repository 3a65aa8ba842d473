"""Fused experts opened for an operation on factors, one module for each expert, and closed again behind it.

What works on one weight at a time then works on every expert by itself: merging by any method, cutting to a rank. The
result has one module for all experts again, at the largest rank of any, the others filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loratools import formats
from loratools.archs._experts import FUSED, SPLIT
from loratools.errors import ShapeError
from loratools.kinds import experts
from loratools.model import EMPTY, Adapter, Module, Target
from loratools.ops import _moe, _moe_convert, _moe_known, _moe_parts, _moe_told, _scale
from loratools.ops._moe_single import has_fused
from loratools.ops._regroup import Step


@dataclass(frozen=True)
class Closing:
    """How opened modules are put together again.

    Attributes:
        counts: By the target of all experts of a layer, how many they are.
        packed: Whether they are written as PEFT packs them.
    """

    counts: Mapping[Target, int] = field(default_factory=dict)
    packed: bool = False

    def closed(self, adapter: Adapter) -> Adapter:
        """An adapter whose opened modules are one for all experts of a layer."""
        if not self.counts:
            return adapter
        parts: dict[Target, dict[int, Module]] = {}
        place: dict[Target, Target] = {}
        for target, module in adapter.modules.items():
            owner, number = _owner(target)
            if owner in self.counts and number is not None:
                parts.setdefault(owner, {})[number] = module
                place[target] = owner
        modules: dict[Target, Module] = {}
        for target, module in adapter.modules.items():
            owner = place.get(target, target)
            if owner not in modules:
                modules[owner] = self._together(owner, parts[owner]) if owner in parts else module
        return replace(adapter, modules=modules)

    def _together(self, target: Target, parts: Mapping[int, Module]) -> Module:
        alike, _ = _scale.alike(list(parts.values()))
        whole = _moe_parts.stacked(dict(zip(parts, alike, strict=True)), self.counts[target], target)
        return _moe_parts.packed(whole) if self.packed else whole


def opened(
    adapters: Sequence[Adapter], layout: str | None, config: Mapping[str, Any] = EMPTY
) -> tuple[list[Adapter], Closing]:
    """Adapters with a module for every expert, all in the style of the first, and how to close the result.

    Args:
        adapters: From ``load``.
        layout: Of the result; None: the first one's.
        config: The base's configuration, or empty.

    Returns:
        The same adapters where none has fused experts, or the layout has no names for experts.

    Raises:
        LoraError: Nothing tells which weights the modules are for, or of how many experts.
        ShapeError: The adapters are of different numbers of experts.
    """
    given = list(adapters)
    form = formats.get(layout or given[0].layout.name) if given else None
    if form is None or not form.experts or not any(has_fused(each.modules.values()) for each in given):
        return given, Closing()
    told = [_moe_told.about(each, config) for each in given]
    known = [_moe_known.known(each) for each in given]
    style = _moe.style_for(form, _moe_convert.KEEP, known[0].modules.values()) or SPLIT
    counts: dict[Target, int] = {}
    found = [_open(_restyled(each, style, about), counts) for each, about in zip(known, told, strict=True)]
    return found, Closing(counts, FUSED in form.experts)


def _restyled(adapter: Adapter, style: str, about: _moe_told.About) -> Adapter:
    steps = _moe.restyled([Step(module, (module,)) for module in adapter.modules.values()], style, about)
    for step in steps:
        if step.problem is not None:
            raise step.problem
    return replace(adapter, modules={step.module.target: step.module for step in steps}, order=())


def _open(adapter: Adapter, counts: dict[Target, int]) -> Adapter:
    """An adapter with a module for every expert that acts."""
    modules: dict[Target, Module] = {}
    for target, module in adapter.modules.items():
        count = experts.count(module) if module.kind == experts.KIND.name else None
        if count is None:
            modules[target] = module
            continue
        if counts.setdefault(target, count) != count:
            raise ShapeError(
                f"{target}: one adapter is of {counts[target]} experts, and another of {count}",
                path=adapter.path or None,
                keys=[ref.name for ref in module.factors.values() if ref.name],
                expected="Adapters of one base model were expected",
                todo="Leave one of them out",
            )
        for number in range(count):
            own = target._replace(path=f"{target.path}.{number}")
            part = _moe_parts.unpadded(_moe_parts.expert(module, number, own))
            if part is not None:
                modules[own] = part
    return replace(adapter, modules=modules, order=())


def _owner(target: Target) -> tuple[Target, int | None]:
    """The target of all experts, and the number of this one; None where the path ends in no number."""
    path, _, last = target.path.rpartition(".")
    return target._replace(path=path), int(last) if last.isdecimal() else None
