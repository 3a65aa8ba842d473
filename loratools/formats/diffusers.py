"""diffusers' layout, all its generations.

The same weight has been spelt ``unet.….attn1.processor.to_q_lora.down.weight`` (attn-procs, 2023),
``unet.….attn1.to_q.lora.down.weight`` (lora-updown) and ``unet.….attn1.to_q.lora_A.weight`` (peft-keys), with or
without the component's prefix. Scales are in the header (``lora_adapter_metadata``: a LoraConfig per component) or in
alpha tensors; a file with neither has alpha = rank. Source: diffusers ``loaders/lora_base.py`` and
``utils/state_dict_utils.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from loratools.errors import MalformedFileError
from loratools.formats import _carried, _names, _peft_config, _spell, _suffixes
from loratools.formats._base import Document, Facts, Format, Group, Scale, cannot_hold
from loratools.formats._names import Naming
from loratools.io import json_text
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef

_HEADER = _carried.DIFFUSERS_HEADER
_PREFIXES = (
    ("text_conditioner.", "text_conditioner"),
    ("text_encoder_4.", "text_encoder_4"),
    ("text_encoder_3.", "text_encoder_3"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("transformer.", "denoiser"),
    ("unet.", "denoiser"),
    ("transformer_2.", "denoiser"),
    ("prior.", "denoiser"),
)
_IMAGE_BODIES = (
    "down_blocks.",
    "up_blocks.",
    "mid_block.",
    "transformer_blocks.",
    "single_transformer_blocks.",
)
# Whose loaders know LoKr; a file of theirs has nothing else.
_LOKR_ARCHS = ("flux2", "z_image")
# How many text encoders the pipelines' loaders take LoRA for; those of the others are passed over in silence.
_ENCODERS_READ = {"sd15": 1, "sd2": 1, "sdxl": 2, "sd3": 2, "sd35_large": 2, "flux": 1, "chroma": 1}
_UPDOWN = {"up": "lora.up.weight", "down": "lora.down.weight"}
_NAMING = Naming(
    "diffusers",
    "diffusers",
    ".",
    {**{owner: prefix for prefix, owner in reversed(_PREFIXES)}, "model": ""},
    # Whether a denoiser is a transformer or a UNet only its own keys tell.
    seen=_PREFIXES,
)


def _claims(facts: Facts) -> float:
    if facts.style == "attn-procs":
        return 0.95
    if facts.style in ("cloneofsimo", "sam"):
        return 0.0
    known = facts.arch not in ("llm", "speech", "vision")
    if known and facts.share(tuple(prefix for prefix, _ in _PREFIXES)) > 0.5:
        # GPT-2's own modules also begin with "transformer."; its body is h.0 and so on.
        return 0.7 if not facts.share(("transformer.h.",)) else 0.0
    if _HEADER in facts.metadata:
        return 0.85
    if not facts.share(("base_model.",)) and facts.share(_IMAGE_BODIES) > 0.5:
        return 0.6
    return 0.0


def _variant(facts: Facts) -> str:
    if facts.style == "attn-procs":
        return "attn-procs"
    if not facts.share(tuple(prefix for prefix, _ in _PREFIXES)):
        return "no-prefix"
    return "lora-updown" if facts.style == "updown" else "peft-keys"


def _scaler(group: Group, component: str, rank: int, facts: Facts) -> Scale:
    text = facts.metadata.get(_HEADER)
    if not text:
        return Scale(1.0)
    names = [prefix[:-1] for prefix, owner in _PREFIXES if owner == component]
    prefix = next((name for name in names if group.name.startswith(name + ".")), "")
    config = _configs(text).get(prefix) or _configs(text).get(names[-1] if names else "")
    if not config:
        return Scale(1.0)
    return _peft_config.scale(config, group.name.removeprefix(prefix + "."), rank)


@lru_cache(maxsize=8)
def _configs(text: str) -> Mapping[str, Mapping[str, Any]]:
    """The header's configurations by component prefix; "" for one without a prefix."""
    try:
        flat = json_text.loads(text)
    except ValueError as error:
        raise MalformedFileError(f"the header's {_HEADER} is not JSON: {error}") from None
    if not isinstance(flat, dict):
        raise MalformedFileError(f"the header's {_HEADER} is not a JSON object")
    configs: dict[str, dict[str, Any]] = {}
    components = {prefix[:-1] for prefix, _ in _PREFIXES}
    for key, value in flat.items():
        head, _, tail = key.partition(".")
        prefix, field = (head, tail) if tail and head in components else ("", key)
        configs.setdefault(prefix, {})[field] = value
    return configs


def configs_of(adapter: Adapter) -> dict[str, Mapping[str, Any]]:
    """The header's configurations by component.

    Raises:
        MalformedFileError: The header holds something else.
    """
    found = _configs(adapter.metadata.get(_HEADER, "{}"))
    named = {owner: found[prefix[:-1]] for prefix, owner in _PREFIXES if prefix[:-1] in found}
    # Without a prefix it is that of a file of one component.
    return {**dict.fromkeys(adapter.components(), found[""]), **named} if "" in found else named


def _prefix(module: Module, adapter: Adapter, layout: Layout) -> str:
    return "" if layout.variant == "no-prefix" else _NAMING.prefix(module, adapter, layout)


def _in_any_transformers(path: str) -> str:
    """A module's path as every release of transformers ends it: since 5.6 CLIP has no ``text_model`` level."""
    return path.removeprefix("text_model.")


def _suffixes_of(module: Module, layout: Layout) -> Mapping[str, str]:
    # The attention processors' generation names only four projections; what it lacks is spelt the later way,
    # which every reader of the former accepts in the same file.
    old = layout.variant in ("lora-updown", "attn-procs") and module.factors.keys() <= _UPDOWN.keys()
    if module.op == "embedding":
        return _suffixes.PEFT_EMBEDDING
    return _UPDOWN if old else _suffixes.PEFT


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    if module.target.component in ("language_model", "speech_model", "vision_model"):
        raise cannot_hold(layout, f"a {module.target.component}", [str(module.target)])
    stem = _prefix(module, adapter, layout) + _NAMING.body(module, adapter, layout)
    if module.kind == "lokr":
        return _lokr(stem, module, adapter, layout)
    _spell.refuse_kind(module, ("lora",), layout)
    tensors = _spell.factors(stem, module, _suffixes_of(module, layout), layout)
    if module.magnitude is not None:
        magnitude = _names.peft_magnitude(module.magnitude, module, layout)
        tensors.append(magnitude.renamed(f"{stem}.{_magnitude_suffix(module)}"))
    return tensors


def _magnitude_suffix(module: Module) -> str:
    """How a DoRA's vector ends: transformers, which loads the text encoders, knows it as a layer's weight alone."""
    inside = module.target.component.startswith("text_encoder")
    return "lora_magnitude_vector.weight" if inside else "lora_magnitude_vector"


def _lokr(stem: str, module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    """A LoKr, which two architectures' loaders take at a scale of 1, in files of nothing else."""
    if adapter.arch not in _LOKR_ARCHS or adapter.kinds.keys() != {"lokr"}:
        what = f"LoKr factors, unless all modules are LoKr and of {' or '.join(_LOKR_ARCHS)}"
        raise cannot_hold(layout, what, [ref.name or role for role, ref in module.factors.items()])
    return _spell.factors(stem, module, _suffixes.LOKR, layout)


def _unread(arch: str, component: str) -> bool:
    """Whether diffusers' pipelines pass over a component's modules: most text encoders."""
    number = {"text_encoder": 1, "text_encoder_2": 2, "text_encoder_3": 3, "text_encoder_4": 4}.get(
        component, 0
    )
    return number > _ENCODERS_READ.get(arch, 0)


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:
    _names.refuse_mixture(adapter, layout)
    metadata = _carried.metadata(adapter, configs_apart=True)
    metadata.setdefault("format", "pt")
    if "lokr" in adapter.kinds:
        # The header's configuration is a LoraConfig.
        return Document(tuple(tensors), metadata)
    starts = _carried.configs(adapter)
    flat: dict[str, Any] = {}
    for component, modules in adapter.components().items():
        prefix = _prefix(modules[0], adapter, layout)
        named = [(_in_any_transformers(_NAMING.body(module, adapter, layout)), module) for module in modules]
        config = _peft_config.build(
            named,
            starts.get(component, {}),
            keep_targets=False,
            anchored=component == "denoiser",
            keep_training=not _carried.is_merged(adapter),
        )
        flat.update({prefix + key: value for key, value in config.items()})
    metadata[_HEADER] = json.dumps(flat, indent=2, sort_keys=True)
    return Document(tuple(tensors), metadata)


FORMAT = Format(
    name="diffusers",
    title="diffusers",
    claims=_claims,
    variant=_variant,
    prefixes=_PREFIXES,
    scaler=_scaler,
    speller=_speller,
    finisher=_finisher,
    roles=frozenset((*_suffixes.PEFT, *_suffixes.LOKR, "magnitude")) - {"lokr_t2"},
    dialect=_NAMING.dialect,
    alpha="config",
    uniform=True,
    unread=_unread,
)
