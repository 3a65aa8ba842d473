"""XLabs' layout for Flux: ``double_blocks.0.processor.qkv_lora1.down.weight``.

Adapters of the attention alone: in double blocks ``lora1`` is the image's stream and ``lora2`` the text's; in single
blocks there is one, and its qkv are the first three sevenths of ``linear1``. No file states alpha; the scale is 1.
Source: XLabs-AI/x-flux ``src/flux/modules/layers.py``, diffusers ``loaders/lora_conversion_utils.py``.
"""

from __future__ import annotations

from loratools import archs
from loratools.formats import _carried, _names, _plain
from loratools.formats._base import Document, Facts, Format, cannot_hold
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef

_DIALECT = "xlabs"


def _claims(facts: Facts) -> float:
    return 1.0 if facts.style == "xlabs" else 0.0


def _name(module: Module, adapter: Adapter) -> str | None:
    """The stem, or None where the layout names no such weight."""
    target = module.target
    found = _names.component(adapter.arch, target.component)
    if found is None or found.table is None or _DIALECT not in found.table.further:
        return None
    return archs.get(adapter.arch).spell(target.component, target.path, target.rows, _DIALECT)


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    up, down = _plain.factors(module, layout)
    stem = _name(module, adapter)
    if stem is None:
        what = "weights other than Flux's attention (qkv and proj of its blocks)"
        raise cannot_hold(layout, what, [str(module.target)])
    return [down.renamed(f"{stem}.down.weight"), up.renamed(f"{stem}.up.weight")]


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:  # noqa: ARG001
    return Document(tuple(tensors), {"format": "pt"} | _carried.metadata(adapter))


FORMAT = Format(
    name="xlabs",
    title="XLabs",
    claims=_claims,
    prefixes=(("", "denoiser"),),
    speller=_speller,
    finisher=_finisher,
    roles=_plain.ROLES,
    dialect=_DIALECT,
    alpha="none",
)
