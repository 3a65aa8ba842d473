"""ai-toolkit's layout: ``lora_A`` and ``lora_B`` without alpha, under the names that each model's code there gives.

Those are the checkpoint's names with ``diffusion_model.`` for most models, diffusers' with ``transformer.`` for some;
an architecture states which. A scale lies in the factors: none is read from the file. LoKr keeps its own names and an
alpha. Reading, such a file is one of ComfyUI's or of diffusers.
Source: ostris/ai-toolkit ``toolkit/network_mixins.py``.
"""

from __future__ import annotations

from loratools.formats import _carried, _names, _spell, _suffixes
from loratools.formats._base import Document, Facts, Format
from loratools.formats._names import Naming
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef

_LORA = {role: _suffixes.PEFT[role] for role in ("up", "down")}
_NAMING = Naming(
    "ai-toolkit",
    "diffusers",
    ".",
    {"denoiser": "transformer."},
    stand_in="diffusers",
)


def _claims(facts: Facts) -> float:  # noqa: ARG001 - such files are read as ComfyUI's or diffusers'
    return 0.0


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    stem = _NAMING.stem(module, adapter, layout)
    if module.kind == "lokr" and module.magnitude is None:
        return _spell.lycoris(stem, module, _suffixes.LOKR, layout)
    _spell.refuse_kind(module, ("lora",) if module.op != "embedding" else (), layout)
    if module.scale != 1.0:
        raise _spell.no_place_for_scale(module, layout)
    tensors = _spell.factors(stem, module, _LORA, layout)
    if module.magnitude is not None:
        magnitude = _names.peft_magnitude(module.magnitude, module, layout)
        tensors.append(magnitude.renamed(f"{stem}.lora_magnitude_vector"))
    return tensors


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:  # noqa: ARG001
    return Document(tuple(tensors), _carried.metadata(adapter))


FORMAT = Format(
    name="ai-toolkit",
    title="ai-toolkit",
    claims=_claims,
    speller=_speller,
    finisher=_finisher,
    # alpha is stated for LoKr alone: the scale of a LoRA can always be folded.
    roles=frozenset((*_LORA, *_suffixes.LOKR, "magnitude", "alpha")),
    dialect=_NAMING.dialect,
    alpha="none",
    reads_as=("comfy", "diffusers"),
)
