"""PEFT's methods other than LoRA: how each spells its tensors, and a configuration that is true for them.

A configuration of such a method says more than its modules do (how LoKr cuts a weight in two, how many terms OFT's
series has), so that only what PEFT has trained is written for PEFT again.
Sources: PEFT ``tuners/<method>/config.py`` and ``layer.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from loratools.errors import LayoutError
from loratools.formats import _peft_config, _suffixes
from loratools.formats._base import cannot_hold
from loratools.formats._patterns import pattern
from loratools.model import Adapter, Layout, Module

# By kind, what configurations call the method.
TYPES: Mapping[str, str] = {
    "ia3": "IA3",
    "loha": "LOHA",
    "lokr": "LOKR",
    "miss": "MISS",
    "oft": "OFT",
    "unilora": "UNILORA",
    "vblora": "VBLORA",
    "vera": "VERA",
}
# The methods that scale their product by alpha / r.
_SCALED = ("LOHA", "LOKR")
# Which modules there are, said otherwise than by their names.
_CHOICE = ("layers_to_transform", "layers_pattern", "exclude_modules")


def holds(module: Module, adapter: Adapter) -> bool:
    """Whether a module is of the method that the adapter's own configuration is for, with nothing beside it."""
    own = module.kind in TYPES and adapter.config.get("peft_type") == TYPES[module.kind]
    known = module.factors.keys() <= {*_suffixes.PEFT_METHODS, *_suffixes.PEFT_SHARED}
    return own and known and module.magnitude is None


def refuse(module: Module, layout: Layout) -> LayoutError:
    """The error for a module that PEFT's layout has no true configuration for."""
    todo = ""
    if module.kind in TYPES:
        method = TYPES[module.kind]
        todo = (
            f"Turn them into LoRA with --as lora: only what PEFT trained as {method} is written as that again"
        )
    keys = [ref.name or role for role, ref in module.factors.items()]
    return cannot_hold(layout, f"modules of kind {module.kind}", keys, todo)


def key(stem: str, role: str) -> str:
    """The key of a factor; what all modules share lies beside the model."""
    shared = _suffixes.PEFT_SHARED.get(role)
    return f"base_model.{shared}" if shared is not None else f"{stem}.{_suffixes.PEFT_METHODS[role]}"


def build(modules: Iterable[tuple[str, Module]], adapter: Adapter) -> dict[str, Any]:
    """A configuration that is true for modules of one of these methods.

    Args:
        modules: Dotted path in the base model, and module; all of one kind.
        adapter: That they are of, for the configuration it came with.
    """
    found = dict(modules)
    start = adapter.config
    config: dict[str, Any] = {**start, "inference_mode": True, "target_modules": sorted(found)}
    config.update({field: None for field in _CHOICE if field in start})
    if start.get("feedforward_modules"):
        config["feedforward_modules"] = _feedforward(found, start["feedforward_modules"])
    if start["peft_type"] in _SCALED and any(
        _peft_config.scale(start, path, module.rank or 0).value != module.scale
        for path, module in found.items()
    ):
        config.update(_alphas(found, start))
    return config


def _feedforward(modules: Iterable[str], stated: object) -> list[str]:
    """Those of the modules that a configuration of (IA)³ calls feed-forward: it wants names that it targets.

    Args:
        modules: Their paths.
        stated: A pattern, or ends of names.
    """
    if isinstance(stated, str):
        return sorted(path for path in modules if pattern(stated).matches(path))
    ends = [str(name) for name in stated] if isinstance(stated, list | tuple | set) else []
    return sorted(path for path in modules if any(path == end or path.endswith(f".{end}") for end in ends))


def _alphas(modules: Mapping[str, Module], start: Mapping[str, Any]) -> dict[str, Any]:
    """alpha and its pattern for the modules' scales, over the ranks that they and the configuration state."""
    usual = start.get("r", 1)
    ranks = {
        path: module.rank or _peft_config.pattern_value(start.get("rank_pattern"), path, usual)
        for path, module in modules.items()
    }
    alphas = {path: module.scale * ranks[path] for path, module in modules.items()}
    most = Counter(alphas.values()).most_common(1)[0][0]
    others = {f"^{re.escape(path)}": value for path, value in sorted(alphas.items()) if value != most}
    return {"alpha": most, "alpha_pattern": others}
