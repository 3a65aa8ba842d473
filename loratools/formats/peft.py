"""PEFT's layout: a folder with ``adapter_config.json`` beside ``adapter_model.safetensors`` (or ``.bin``).

Keys are ``base_model.model.<module>.lora_A.weight``; the scale is in the configuration. Real files have the prefix
doubled or missing, and framework wrappers inside. Source: PEFT ``utils/save_and_load.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.archs._experts import FUSED, REGISTERED, SPLIT
from loratools.formats import _carried, _names, _peft_config, _peft_methods, _peft_special, _spell, _suffixes
from loratools.formats._base import Document, Facts, Format, Group, Scale, cannot_hold
from loratools.formats._group import PEFT, clean
from loratools.formats._names import Naming
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef

# AdaLoRA's factors are bare parameters.
_ADALORA = {"up": "lora_B", "down": "lora_A", "lora_E": "lora_E", "ranknum": "ranknum"}
# BD-LoRA stores the blocks of a factor under the factor's own name; KaSA has a diagonal between the factors.
_VARIANTS = {"up_blocks": "lora_B.weight", "down_blocks": "lora_A.weight", "lora_diag": "lora_diag"}
_SUFFIXES = {**_ADALORA, **_suffixes.PEFT, **_VARIANTS}
_EXPERTS = "experts"
_LORAS = ("lora", "adalora", _EXPERTS, *_peft_special.KINDS)
_BASE_LAYER = ".base_layer"
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
    if module.kind not in _LORAS:
        if not _peft_methods.holds(module, adapter):
            raise _peft_methods.refuse(module, layout)
        return [ref.renamed(_peft_methods.key(stem, role)) for role, ref in module.factors.items()]
    if module.kind == _EXPERTS:
        return _experts_tensors(module, adapter, layout)
    if not _peft_special.is_stated(module, adapter):
        raise _peft_special.refuse_unstated(module, layout)
    suffixes = _ADALORA if module.kind == "adalora" else _SUFFIXES
    if module.op == "embedding":
        suffixes = {**suffixes, **_suffixes.PEFT_EMBEDDING}
    tensors = _spell.factors(stem, module, suffixes, layout)
    if module.magnitude is not None:
        magnitude = _names.peft_magnitude(module.magnitude, module, layout)
        tensors.append(magnitude.renamed(f"{stem}.lora_magnitude_vector"))
    return tensors


def _experts_tensors(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    """Packed experts under the names of PEFT's wrappers: of an owner's parameters, the last registered is outermost."""
    path = _path(module, adapter, layout)
    owner, _, leaf = path.rpartition(".")
    keys = [ref.name or str(module.target) for ref in module.factors.values()]
    if not module.rank or any(len(ref.shape) != 2 for ref in module.factors.values()):
        raise cannot_hold(layout, "experts of which nothing tells how many they are", keys)
    if leaf not in REGISTERED or any(each.magnitude is not None for each in adapter.modules.values()):
        what = (
            f"factors of the parameter {leaf}" if leaf not in REGISTERED else "DoRA beside target_parameters"
        )
        raise cannot_hold(layout, what, keys, "Write a module for each expert with --experts split")
    before = module.target.path.removesuffix(leaf)
    outer = [
        name
        for name in REGISTERED[REGISTERED.index(leaf) + 1 :]
        if module.target._replace(path=before + name) in adapter.modules
    ]
    stem = f"{PEFT}{owner}{_BASE_LAYER * len(outer)}"
    return [ref.renamed(f"{stem}.{_SUFFIXES[role]}") for role, ref in module.factors.items()]


def _refuse_second_component(module: Module, adapter: Adapter, layout: Layout) -> None:
    """Refuse a module of a second component under the same prefix: a folder is of one model."""
    own, main = module.target.component, _names.main_component(adapter)
    if own != main and _NAMING.stated(adapter.arch, own) == _NAMING.stated(adapter.arch, main):
        what = f"more than one component: a {own} beside a {main}"
        raise cannot_hold(layout, what, [str(module.target)])


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:
    _names.refuse_mixture(adapter, layout)
    named = [(_path(module, adapter, layout), module) for module in adapter.modules.values()]
    if adapter.kinds.keys() - _LORAS:
        return Document(
            tuple(tensors), _metadata(adapter), dict(sorted(_methods(named, adapter, layout).items()))
        )
    start, keep = _start(adapter, {path for path, _ in named})
    config = _peft_config.build(
        named, start, keep_targets=keep, keep_training=not _carried.is_merged(adapter)
    )
    return Document(tuple(tensors), _metadata(adapter), dict(sorted(config.items())))


def _metadata(adapter: Adapter) -> dict[str, str]:
    metadata = _carried.metadata(adapter, configs_apart=True)
    metadata.setdefault("format", "pt")
    return metadata


def _methods(named: list[tuple[str, Module]], adapter: Adapter, layout: Layout) -> dict[str, Any]:
    """The configuration of one of PEFT's other methods: a folder is of one."""
    kinds = sorted(adapter.kinds)
    if len(kinds) > 1:
        keys = [str(module.target) for _, module in named if module.kind != kinds[0]]
        raise cannot_hold(layout, f"modules of kinds {' and '.join(kinds)} together", keys)
    return _peft_methods.build(named, adapter)


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
    roles=frozenset((*_SUFFIXES, *_suffixes.PEFT_METHODS, *_suffixes.PEFT_SHARED, "magnitude")),
    dialect=_NAMING.dialect,
    alpha="config",
    single=True,
    uniform=True,
    experts=(SPLIT, FUSED),
)
