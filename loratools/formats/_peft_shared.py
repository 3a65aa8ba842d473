"""PEFT's methods that share tensors between modules: the shared ones are given to each, and written once.

VeRA, VB-LoRA and Uni-LoRA keep what all modules have in common beside the model (``base_model.vera_A``). A module has
them as factors like its own, under their one key.
Sources: PEFT ``tuners/{vera,vblora,unilora}/model.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratools.errors import UnsupportedKindError
from loratools.formats import _peft_config, _peft_special
from loratools.formats._base import Facts, Group
from loratools.model import Adapter
from loratools.tensors import TensorRef

# What a module must have to be given a shared tensor: one of these roles.
_TAKERS: Mapping[str, tuple[str, ...]] = {
    "vera_a": ("vera_lambda_d",),
    "vera_b": ("vera_lambda_d",),
    "vblora_bank": ("vblora_logits_a", "vblora_indices_a"),
    "unilora_theta": ("unilora_indices_a",),
}
# Their keys where nothing stands before them.
_BARE = {
    "vera_A": "vera_a",
    "vera_B": "vera_b",
    "vblora_vector_bank": "vblora_bank",
    "unilora_theta_d": "unilora_theta",
}
_ALONE = "unilora_theta"
# PEFT's default for VB-LoRA, and for VeRA's seed.
_TOPK, _KEY = 2, 0


def distribute(groups: dict[str, Group], left: dict[str, TensorRef]) -> None:
    """Give shared tensors to the modules that use them.

    Args:
        groups: The modules by stem; what is no module but shared tensors alone is taken out.
        left: Tensors of no module: shared ones without a prefix are taken from it, those that nobody uses added.
    """
    holders = {stem: found for stem, found in groups.items() if found.roles.keys() <= _TAKERS.keys()}
    shared = {role: ref for found in holders.values() for role, ref in found.roles.items()}
    shared |= {role: left[key] for key, role in _BARE.items() if key in left}
    if not shared:
        return
    taken: set[str] = set()
    for role, ref in shared.items():
        for found in groups.values():
            if role not in found.roles and any(taker in found.roles for taker in _TAKERS[role]):
                found.roles[role] = ref
                taken.add(ref.name)
    for key in taken & left.keys():
        del left[key]
    for stem, found in holders.items():
        unused = {role: ref for role, ref in found.roles.items() if ref.name not in taken}
        # A Uni-LoRA may be its vector alone.
        left.update({ref.name: ref for role, ref in unused.items() if role != _ALONE})
        found.roles = {role: ref for role, ref in unused.items() if role == _ALONE}
        if not found.roles:
            del groups[stem]


def variant(facts: Facts) -> str:
    """What the configuration says of a method's formula, and what all modules together say of their weights.

    The words are those that the kinds read: :mod:`loratools.kinds.oft`, ``vera`` and ``vblora``.
    """
    method = _method(facts.config)
    if method == "VBLORA":
        return f"topk={_whole(facts.config.get('topk'), _TOPK)}"
    groups = [found for found in facts.groups.values() if "vera_lambda_d" in found.roles]
    if not groups:
        return _peft_config.variant(facts.config) or _peft_special.variant(facts.config)
    if any("vera_a" in found.roles for found in groups):
        width = inputs(groups)
        return f"inputs={width}" if width is not None else ""
    return f"key={_whole(facts.config.get('projection_prng_key'), _KEY)}" if method == "VERA" else ""


def inputs(groups: Iterable[Group]) -> int | None:
    """How many inputs all VeRA modules have: those of their shared projection, if no module suggests fewer.

    The projection is as wide as the widest weight. Modules of one name are of one shape; and where all have as many
    outputs as the projection has inputs, all are taken to be square.

    Returns:
        None where the modules may differ.
    """
    found = [group for group in groups if {"vera_a", "vera_lambda_b"} <= group.roles.keys()]
    widths = {group.roles["vera_a"].shape[-1] for group in found}
    if len(widths) != 1:
        return None
    width = widths.pop()
    outputs = {group.roles["vera_lambda_b"].numel for group in found}
    leaves = {group.name.rpartition(".")[2] for group in found}
    return width if len(outputs) == 1 and (len(leaves) == 1 or outputs == {width}) else None


def notes(facts: Facts) -> list[str]:
    """What a reader should know of shared tensors, and of those that are not there."""
    groups = facts.groups.values()
    vera = [found for found in groups if "vera_lambda_d" in found.roles]
    if any("unilora_theta" in found.roles and "unilora_indices_a" not in found.roles for found in groups):
        return [
            "only the trained vector of this Uni-LoRA is stored, not which weights its values go to: that follows "
            "from the order in which the model's code defines its layers; PEFT stores it with save_indices=True"
        ]
    if not vera:
        return []
    if not any("vera_a" in found.roles for found in vera):
        return [
            "VeRA's projections are not stored: they are drawn anew from their seed, as wide as a base needs"
        ]
    width = inputs(vera)
    if width is None:
        return ["VeRA does not store how many inputs each weight has: a base model tells (--base)"]
    return [f"VeRA does not store how many inputs a weight has: all are taken to have {width}"]


def refuse_bare(adapter: Adapter) -> None:
    """Refuse a Uni-LoRA whose file does not tell which weights its values go to.

    Raises:
        UnsupportedKindError: It is such.
    """
    for module in adapter.modules.values():
        if module.kind == "unilora" and "unilora_indices_a" not in module.factors:
            raise UnsupportedKindError(
                "only the trained vector of a Uni-LoRA is stored, not which weights its values go to",
                path=adapter.path or None,
                keys=[ref.name for ref in module.factors.values()],
                expected="unilora_indices and unilora_scales of every module were expected",
                todo="Save the adapter again with PEFT and save_indices=True",
            )


def _method(config: Mapping[str, Any]) -> str:
    return str(config.get("peft_type", "")).upper()


def _whole(stated: object, default: int) -> int:
    return stated if isinstance(stated, int) and not isinstance(stated, bool) else default
