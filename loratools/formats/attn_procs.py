"""diffusers' first layout: ``unet.….attn1.processor.to_q_lora.down.weight``, named after attention processors.

Attention projections of a UNet and of CLIP text encoders are all that it has names for. No file states alpha; the
scale is 1. Files of it are read as diffusers'. Source: diffusers 0.12 to 0.21, ``loaders.py``.
"""

from __future__ import annotations

import re

from loratools.formats import _carried, _names, _plain
from loratools.formats._base import Document, Facts, Format, cannot_hold
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef

_UNET = r"(.+\.attn[12])\.to_(q|k|v|out)(?:\.0)?"
_CLIP = r"(text_model\.encoder\.layers\.\d+\.self_attn)\.(q|k|v|out)_proj"


def _claims(facts: Facts) -> float:  # noqa: ARG001 - what is written so is read as diffusers' layout
    return 0.0


def _stem(module: Module, adapter: Adapter, layout: Layout) -> str | None:
    """A projection's name without its factor; None where the layout has none for it."""
    component = _names.component(adapter.arch, module.target.component)
    prefix = component.prefix("diffusers") if component is not None else None
    if not prefix or not prefix.startswith(("unet.", "text_encoder")):
        return None
    body = _names.body(adapter.arch, module.target, "diffusers", ".", layout)
    found = re.fullmatch(_UNET, body)
    if found:
        return f"{prefix}{found[1]}.processor.to_{found[2]}_lora"
    found = re.fullmatch(_CLIP, body)
    return f"{prefix}{found[1]}.to_{found[2]}_lora" if found else None


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    up, down = _plain.factors(module, layout)
    stem = _stem(module, adapter, layout)
    if stem is None:
        what = "weights other than the attention of a UNet and of its text encoders"
        raise cannot_hold(layout, what, [str(module.target)])
    return [down.renamed(f"{stem}.down.weight"), up.renamed(f"{stem}.up.weight")]


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:  # noqa: ARG001
    return Document(tuple(tensors), {"format": "pt"} | _carried.metadata(adapter))


FORMAT = Format(
    name="attn-procs",
    title="diffusers' attention processors",
    claims=_claims,
    speller=_speller,
    finisher=_finisher,
    roles=_plain.ROLES,
    alpha="none",
    reads_as=("diffusers",),
)
