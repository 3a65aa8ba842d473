"""Kohya's layout: ``lora_unet_mid_block_1_proj_in.lora_down.weight``, read by A1111, ComfyUI and most others.

The component is a prefix, the module's path is flattened with underscores, alpha is a 0-d tensor beside the factors
and the scale is alpha / rank. Source: kohya-ss/sd-scripts ``networks/lora.py``.
"""

from __future__ import annotations

from loratools.formats import _kohya_metadata, _names
from loratools.formats._base import Document, Facts, Format, Group, Scale, cannot_hold
from loratools.model import Adapter, Layout, Module
from loratools.tensors import DTYPES, TensorRef, from_scalar

_PREFIXES = (
    ("lora_unet_unet_", "denoiser"),
    ("lora_unet_", "denoiser"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("oft_unet_", "denoiser"),
    ("lycoris_", "denoiser"),
)
_SPELT = {"denoiser": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
_SUFFIXES = {
    "up": "lora_up.weight",
    "down": "lora_down.weight",
    "mid": "lora_mid.weight",
    "diff": "diff",
    "diff_b": "diff_b",
}


def _claims(facts: Facts) -> float:
    return facts.share(tuple(prefix for prefix, _ in _PREFIXES))


def _variant(facts: Facts) -> str:
    if facts.share(("lora_unet_unet_",)) or "glued" in facts.styles:
        return "malformed"
    return "lycoris" if facts.share(("lycoris_",)) else ""


def _scaler(group: Group, component: str, rank: int, facts: Facts) -> Scale:  # noqa: ARG001
    # Without alpha the trainers' loaders take alpha = rank.
    return Scale(1.0)


def _stem(module: Module, adapter: Adapter, layout: Layout) -> str:
    target = module.target
    component = _names.component(adapter.arch, target.component)
    if component is not None and "kohya" in component.prefixes:
        name = _names.body(adapter.arch, target, component.kohya_dialect, "_", layout)
        return component.prefixes["kohya"][0] + name
    if target.component not in _SPELT:
        raise cannot_hold(
            layout, f"a {target.component}", [str(target)], "Write it as diffusers or PEFT instead"
        )
    return _SPELT[target.component] + _names.body(adapter.arch, target, "native", "_", layout)


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    stem = _stem(module, adapter, layout)
    unknown = [ref.name or role for role, ref in module.factors.items() if role not in _SUFFIXES]
    if module.kind != "lora" or unknown:
        raise cannot_hold(layout, f"what {stem} has", unknown or [module.kind])
    tensors = [_alpha(stem, module)]
    tensors += [ref.renamed(f"{stem}.{_SUFFIXES[role]}") for role, ref in module.factors.items()]
    if module.magnitude is not None:
        tensors.append(_magnitude(module.magnitude, module).renamed(f"{stem}.dora_scale"))
    return tensors


def _magnitude(magnitude: TensorRef, module: Module) -> TensorRef:
    """A DoRA's vector as (out, 1[, 1, 1]) or (1, in[, 1, 1]): readers tell the axis by the shape."""
    ones = (1,) * (len(module.shape or ()) - 1)
    shape = (1, magnitude.numel, *ones[1:]) if module.magnitude_axis == "in" else (magnitude.numel, *ones)
    return magnitude.reshaped(shape)


def _alpha(stem: str, module: Module) -> TensorRef:
    alpha = module.scale * (module.rank or 1)
    dtype = module.factors["up"].dtype
    # An alpha that the factors' dtype would round is kept in float32.
    stored = from_scalar(f"{stem}.alpha", alpha, dtype if dtype in ("F16", "F32", "F64") else "F32")
    if dtype in DTYPES and stored.scalar() == alpha:
        return stored
    return from_scalar(f"{stem}.alpha", alpha, "F64" if dtype == "F64" else "F32")


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:  # noqa: ARG001
    metadata = _kohya_metadata.complete(adapter, tensors)
    return Document(tuple(tensors), metadata)


FORMAT = Format(
    name="kohya",
    title="Kohya",
    claims=_claims,
    variant=_variant,
    prefixes=_PREFIXES,
    scaler=_scaler,
    speller=_speller,
    finisher=_finisher,
    roles=frozenset({*_SUFFIXES, "alpha", "magnitude", "magnitude_in"}),
    dialect="kohya",
    alpha="tensor",
)
