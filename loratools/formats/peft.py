"""PEFT's layout: a folder with ``adapter_config.json`` beside ``adapter_model.safetensors`` (or ``.bin``).

Keys are ``base_model.model.<module>.lora_A.weight``; the scale is in the configuration. Real files have the prefix
doubled or missing, and framework wrappers inside. Source: PEFT ``utils/save_and_load.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.formats import _carried, _names, _peft_config, _spell, _suffixes
from loratools.formats._base import Document, Facts, Format, Group, Scale, cannot_hold
from loratools.formats._group import PEFT, clean
from loratools.formats._names import Naming
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef

# AdaLoRA's factors are bare parameters.
_ADALORA = {"up": "lora_B", "down": "lora_A", "lora_E": "lora_E", "ranknum": "ranknum"}
_SUFFIXES = {**_ADALORA, **_suffixes.PEFT}
_NAMING = Naming("peft", "diffusers", ".", default=PEFT)


def _claims(facts: Facts) -> float:
    if facts.share(("base_model.",)):
        return 0.9
    if "peft_type" in facts.config and not facts.metadata.get("lora_adapter_metadata"):
        return 0.8
    bare = facts.style == "peft" and facts.arch in ("unknown", "llm", "speech", "vision")
    return 0.3 if bare else 0.0


def _variant(facts: Facts) -> str:
    if not facts.share(("base_model.",)):
        return "no-prefix" if facts.groups else ""
    plain = all(group.name == group.stem.removeprefix(PEFT) for group in facts.groups.values())
    return "" if plain else "wrapped"


def _scaler(group: Group, component: str, rank: int, facts: Facts) -> Scale:  # noqa: ARG001
    if not facts.config:
        return Scale(1.0, None, "no adapter_config.json lies beside it; a scale of 1 is assumed")
    return _peft_config.scale(facts.config, group.name, rank)


def _path(module: Module, adapter: Adapter, layout: Layout) -> str:
    """The module's dotted path in the base model as PEFT sees it."""
    within = _NAMING.prefix(module, adapter, layout).removeprefix(PEFT)
    return within + _NAMING.body(module, adapter, layout)


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    _refuse_second_component(module, adapter, layout)
    stem = PEFT + _path(module, adapter, layout)
    _spell.refuse_kind(module, ("lora", "adalora"), layout)
    suffixes = _ADALORA if module.kind == "adalora" else _SUFFIXES
    if module.op == "embedding":
        suffixes = {**suffixes, **_suffixes.PEFT_EMBEDDING}
    tensors = _spell.factors(stem, module, suffixes, layout)
    if module.magnitude is not None:
        magnitude = _names.peft_magnitude(module.magnitude, module, layout)
        tensors.append(magnitude.renamed(f"{stem}.lora_magnitude_vector"))
    return tensors


def _refuse_second_component(module: Module, adapter: Adapter, layout: Layout) -> None:
    """Refuse a module of a second component under the same prefix: a folder is of one model."""
    own, main = module.target.component, _names.main_component(adapter)
    if own != main and _NAMING.stated(adapter.arch, own) == _NAMING.stated(adapter.arch, main):
        what = f"more than one component: a {own} beside a {main}"
        raise cannot_hold(layout, what, [str(module.target)])


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:
    _names.refuse_mixture(adapter, layout)
    named = [(_path(module, adapter, layout), module) for module in adapter.modules.values()]
    start, keep = _start(adapter, {path for path, _ in named})
    config = _peft_config.build(
        named, start, keep_targets=keep, keep_training=not _carried.is_merged(adapter)
    )
    metadata = _carried.metadata(adapter, configs_apart=True)
    metadata.setdefault("format", "pt")
    return Document(tuple(tensors), metadata, dict(sorted(config.items())))


def _start(adapter: Adapter, paths: set[str]) -> tuple[Mapping[str, Any], bool]:
    # target_modules of the configuration holds only as long as no module has come or gone.
    config = next(iter(_carried.configs(adapter).values()), {})
    before = {clean(key.rsplit(".lora_", 1)[0]) for key in adapter.order if ".lora_" in key}
    own = adapter.layout.name == "peft"
    return config, own and bool(config.get("target_modules")) and before == paths


FORMAT = Format(
    name="peft",
    title="PEFT",
    claims=_claims,
    variant=_variant,
    scaler=_scaler,
    speller=_speller,
    finisher=_finisher,
    folder=True,
    roles=frozenset((*_SUFFIXES, "magnitude")),
    dialect=_NAMING.dialect,
    alpha="config",
    single=True,
    uniform=True,
)
