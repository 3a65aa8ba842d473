"""Experts as single modules under names of no layout, so that two readings of them can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loratools.archs import _experts as names
from loratools.errors import UnsupportedKindError
from loratools.kinds import experts
from loratools.model import Module, Target
from loratools.ops import _moe, _moe_parts
from loratools.ops._moe_told import About
from loratools.ops._regroup import Step


def has_fused(modules: Iterable[Module]) -> bool:
    """Whether any module is of all experts of a layer."""
    return any(module.kind == experts.KIND.name for module in modules)


def singly(modules: Iterable[Module], told: About) -> list[Module]:
    """Modules with those of experts taken apart, as far as they act; the others as they are.

    Args:
        modules: Packed ones are known by their parameters' names.
        told: What is known of the model's experts. Where no family is, gate and up stay one weight if they are: no
            conversion takes them apart without knowing how.
    """
    steps = [Step(module, (module,)) for module in modules]
    groups = _moe.grouped(steps)
    inside = {id(member.step) for members in groups.values() for member in members}
    found = [step.module for step in steps if id(step) not in inside]
    for members in groups.values():
        found += _layer(members, told)
    return found


def _layer(members: Sequence[_moe.Member], told: About) -> list[Module]:
    try:
        family = told.family or names.FAMILIES[0]
        block = _moe.Block(members, "", About(family))
        roles = block.apart(whole=told.family is None)
    except UnsupportedKindError:  # what is not put together or taken apart is compared as it is
        return [member.step.module for member in members]
    left = [
        (Target(block.component, f"{block.name}experts.{number}.{role}"), _moe_parts.unpadded(part))
        for role, parts in roles.items()
        for number, part in parts.items()
    ]
    return [part._replace(target=target) for target, part in left if part is not None]
