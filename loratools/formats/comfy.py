"""ComfyUI's native layout: the base checkpoint's own dotted names under ``diffusion_model.`` and ``text_encoders.``.

The factors are spelt as in PEFT or as in Kohya's layout, alpha may be a tensor. Written are ``lora_A`` and ``lora_B``:
ComfyUI reads both spellings, diffusers takes ``diffusion_model.`` names with these for most architectures, and so do
the trainers that continue from a file. A Tucker core is read with Kohya's spelling only, so that a module with one is
spelt so. alpha and ``dora_scale`` have one name whatever the factors are called. Source: ComfyUI ``comfy/lora.py`` and
``comfy/weight_adapter``.
"""

from __future__ import annotations

from loratools.formats import _carried, _spell, _suffixes
from loratools.formats._base import Document, Facts, Format
from loratools.formats._names import Naming
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef

_PREFIXES = (
    ("model.diffusion_model.", "denoiser"),
    ("diffusion_model.", "denoiser"),
    ("conditional_transformer.", "denoiser"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2"),
    ("text_encoders.", "text_encoder"),
)
_SUFFIXES = {role: _suffixes.PEFT[role] for role in ("up", "down")} | dict(_suffixes.LYCORIS)
_NAMING = Naming(
    "comfy",
    "native",
    ".",
    {"denoiser": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer.", "model": ""},
)


def _claims(facts: Facts) -> float:
    return 0.9 if facts.share(tuple(prefix for prefix, _ in _PREFIXES)) > 0.5 else 0.0


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    suffixes = _spell.FLATTENED if "mid" in module.factors else _SUFFIXES
    return _spell.lycoris(_NAMING.stem(module, adapter, layout), module, suffixes, layout)


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:  # noqa: ARG001
    return Document(tuple(tensors), _carried.metadata(adapter))


FORMAT = Format(
    name="comfy",
    title="ComfyUI",
    claims=_claims,
    prefixes=_PREFIXES,
    speller=_speller,
    finisher=_finisher,
    roles=_spell.ROLES,
    dialect=_NAMING.dialect,
    alpha="tensor",
    adopt=_carried.token,
)
