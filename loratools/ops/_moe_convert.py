"""A conversion's stages where an adapter has experts: named, brought into a style, and packed for PEFT."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from loratools.archs import _experts as names
from loratools.archs._experts import FUSED
from loratools.errors import NameResolutionError
from loratools.formats import Format
from loratools.io.base import Base, config_of
from loratools.kinds import experts
from loratools.model import Adapter, Module
from loratools.ops import _moe, _moe_known, _moe_parts, _moe_told
from loratools.ops._moe_single import has_fused
from loratools.ops._moe_told import About
from loratools.ops._regroup import Regrouped, Step

KEEP = "keep"
# One of these is in the names of experts, whatever the family.
_CALLED = ("expert", "moe", "switch_mlp")


def told(
    adapter: Adapter, base: str | os.PathLike[str] | None, count: int | None = None
) -> tuple[Adapter, About]:
    """An adapter with its packed experts named and counted, and what is known of them.

    Args:
        adapter: From ``load``.
        base: The base model, whose configuration tells more; or None.
        count: How many experts there are, where the caller says so.

    Raises:
        LoraError: Nothing tells which parameters the modules are for, or of how many experts.
    """
    if not any(names.is_experts(path) for path in _paths(adapter)) and not has_fused(
        adapter.modules.values()
    ):
        return adapter, About(total=count)
    config = config_of(base)[1] if base is not None else {}
    about = _moe_told.about(adapter, config, count)
    # The rank that the configuration states is surer than a model that may be another one.
    needed = count if count is not None or isinstance(adapter.config.get("r"), int) else about.total
    found = _moe_known.known(adapter, needed)
    places = [place for path in _paths(found) if (place := names.place(path)) is not None]
    return found, _moe_told.settled(about, places)


def _paths(adapter: Adapter) -> list[str]:
    return [target.path for target in adapter.modules]


def apart(adapter: Adapter) -> tuple[Adapter, Adapter]:
    """The modules of experts, and all others: models call experts otherwise than adapters do."""
    chosen = {target: module for target, module in adapter.modules.items() if names.is_experts(target.path)}
    rest = {target: module for target, module in adapter.modules.items() if target not in chosen}
    return replace(adapter, modules=chosen), replace(adapter, modules=rest)


def refuse_without(special: Adapter, base: Base) -> None:
    """Refuse modules of experts for a base in which nothing is called like one.

    How a base stores its experts, and whether this one is their own, the other stages find out; a base of which only
    the configuration is there says nothing of its names.

    Raises:
        NameResolutionError: It is a model of another sort.
    """
    keys = [key for part in base.parts.values() for key in part]
    if not keys or not special.modules or any(word in key.lower() for key in keys for word in _CALLED):
        return
    raise NameResolutionError(
        f"{len(special.modules)} modules are of experts, and {base.path} has none",
        path=special.path or None,
        keys=[ref.name for module in special.modules.values() for _, ref in module.tensors() if ref.name],
        expected="A mixture of experts was expected",
        todo="Give the base that the adapter was trained on",
    )


def styled(regrouped: Regrouped, form: Format, asked: str, about: About, *, open_up: bool) -> Regrouped:
    """Steps with their experts in the style that was asked for, or that the layout needs.

    Args:
        regrouped: At the layout's grain.
        form: The layout.
        asked: "keep", "split" or "fused".
        about: What is known of the experts.
        open_up: Whether experts have an axis of their own afterwards, whatever the layout packs.

    Raises:
        UnsupportedKindError: The layout has no names for what was asked for.
    """
    style = _moe.style_for(form, asked, [step.module for step in regrouped.steps])
    found = _moe.restyled(regrouped.steps, style, about)
    if open_up:
        found = [step._replace(module=_opened(step)) for step in found]
    return regrouped._replace(steps=tuple(found))


def seen(adapter: Adapter, regrouped: Regrouped) -> Adapter:
    """An adapter with its experts in the style that steps have brought them into."""
    rest = {target: each for target, each in adapter.modules.items() if not names.is_experts(target.path)}
    now = [step.module for step in regrouped.steps if names.is_experts(step.module.target.path)]
    return replace(adapter, modules={**rest, **{module.target: module for module in now}})


def _opened(step: Step) -> Module:
    counted = step.module.kind == experts.KIND.name and experts.count(step.module) is not None
    return _moe_parts.unpacked(step.module) if counted else step.module


def packed(steps: Sequence[Step], form: Format) -> list[Step]:
    """Steps with stacked experts as PEFT packs them, where the layout does."""
    if FUSED not in form.experts:
        return list(steps)
    return [
        step._replace(module=_moe_parts.packed(step.module))
        if step.problem is None and step.module.kind == experts.KIND.name
        else step
        for step in steps
    ]
