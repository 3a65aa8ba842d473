"""What a LoraConfig says that changes what the factors mean: a changed base, repeated layers, another formula.

Source: PEFT ``tuners/lora/config.py``, ``layer.py`` and ``variants.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.errors import LayoutError, UnsupportedKindError
from loratools.formats import _carried, _peft_checks
from loratools.formats._base import cannot_hold
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef

# Initialisations that take part of the base weight into the factors, and leave the rest as the base.
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")

_ROUTED = "arrow_config"
_POOLED = "use_qalora"
_INVOKED = "alora_invocation_tokens"
_BLOCKS = "use_bdlora"

KINDS: Mapping[str, str] = {"bdlora": _BLOCKS, "kasa": "kasa_config"}
"""Kinds that PEFT knows as variants of LoRA, and the field of a LoraConfig that says so."""


def mutating(config: Mapping[str, Any]) -> str:
    """The initialisation that has changed the base: "pissa", "olora", …; empty where none has."""
    method = str(config.get("init_lora_weights")).lower()
    return next((name for name in _MUTATING if method.startswith(name)), "")


def changed_base(config: Mapping[str, Any]) -> str:
    """What to say of an adapter that is only valid on a base that its training has changed; else empty."""
    if mutating(config):
        method = str(config.get("init_lora_weights")).lower()
        return (
            f"init_lora_weights is {method}: ΔW is relative to the base that this initialisation has changed"
        )
    if config.get("layer_replication"):
        return "layer_replication repeats layers: their numbers are not those of the base"
    return ""


def notes(config: Mapping[str, Any]) -> list[str]:
    """What a reader should know of an adapter whose configuration is not that of a plain LoRA."""
    return [said for said in (changed_base(config), _conditional(config)) if said]


def refuse_unmergeable(adapter: Adapter) -> None:
    """Refuse what has no ΔW of the base as it was published, or of which nobody can say how it is scaled.

    Raises:
        MalformedFileError: Its configuration contradicts its tensors.
        UnsupportedKindError: Its configuration says so; the message names the field.
    """
    refuse_changed_base(adapter)
    _peft_checks.refuse_contradicted(adapter)
    for config in _carried.configs(adapter).values():
        said = _conditional(config)
        if said:
            raise UnsupportedKindError(
                said,
                path=adapter.path or None,
                expected="An adapter was expected whose ΔW adds to every input alike",
                todo=_todo(config),
            )


def refuse_changed_base(adapter: Adapter) -> None:
    """Refuse what is only valid on a base that its training has changed: PiSSA and the like, repeated layers.

    Raises:
        UnsupportedKindError: It is such.
    """
    for config in _carried.configs(adapter).values():
        said = changed_base(config)
        if said:
            raise UnsupportedKindError(
                said,
                path=adapter.path or None,
                expected="An adapter of the base as it was published was expected",
                todo=_todo_of_base(config),
            )


def _todo_of_base(config: Mapping[str, Any]) -> str:
    method = mutating(config)
    if not method:
        return (
            "Where the base given is the one with repeated layers, set layer_replication to null in "
            "adapter_config.json"
        )
    return (
        f"Convert it with --initial DIR, its factors before training (PEFT's examples call the folder {method}_init); "
        "or, where the base given is the changed one, set init_lora_weights to true in adapter_config.json"
    )


def _conditional(config: Mapping[str, Any]) -> str:
    """Why the adapter's effect is no constant ΔW; empty where it is one."""
    if config.get(_INVOKED):
        return (
            f"{_INVOKED} is {config[_INVOKED]!r}: the adapter acts only behind these tokens (aLoRA), which no weight "
            "can hold"
        )
    if config.get(_ROUTED):
        return f"{_ROUTED} is set: the adapters are chosen for each token (Arrow), which no weight can hold"
    if config.get(_POOLED):
        return (
            f"{_POOLED} is set: on a quantised base, lora_A multiplies means over {config.get('qalora_group_size')} "
            "inputs (qalora_group_size), on another one the inputs themselves, and the file does not tell which"
        )
    return ""


def _todo(config: Mapping[str, Any]) -> str:
    if config.get(_POOLED):
        return "Use it with PEFT; or, where the base was not quantised, set use_qalora to false"
    return "Use it with a program that switches it on and off: PEFT, vLLM, llama.cpp"


def is_stated(module: Module, adapter: Adapter) -> bool:
    """Whether the adapter's own configuration says what a variant of LoRA needs; of a plain one it need not."""
    return module.kind not in KINDS or bool(adapter.config.get(KINDS[module.kind]))


def refuse_unstated(module: Module, layout: Layout) -> LayoutError:
    """The error for a variant that no configuration describes."""
    keys = [ref.name or role for role, ref in module.factors.items()]
    todo = "Turn them into LoRA with --as lora: only what PEFT trained as such is written as that again"
    return cannot_hold(layout, f"modules of kind {module.kind}", keys, todo)


def stored(config: Mapping[str, Any], module: str, roles: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """A module's tensors by role, with BD-LoRA's blocks under a role of their own: what is stored is no whole factor.

    PEFT looks for the configuration's names anywhere in the last word of the module's path.

    Args:
        config: A LoraConfig as a mapping.
        module: The module's dotted path.
        roles: Its tensors as their keys say.
    """
    stated = config.get(_BLOCKS)
    if not isinstance(stated, Mapping) or not {"up", "down"} <= roles.keys():
        return roles
    last = module.rpartition(".")[2]
    for role, field in (("down", "target_modules_bd_a"), ("up", "target_modules_bd_b")):
        if any(str(name) in last for name in stated.get(field) or ()):
            return {f"{own}_blocks" if own == role else own: ref for own, ref in roles.items()}
    return roles


def variant(config: Mapping[str, Any]) -> str:
    """How many blocks BD-LoRA has, as :mod:`loratools.kinds.bdlora` reads it; empty for other methods."""
    stated = config.get(_BLOCKS)
    if not isinstance(stated, Mapping):
        return ""
    number = stated.get("nblocks", 1)
    return f"blocks={number}" if isinstance(number, int) and not isinstance(number, bool) else ""
