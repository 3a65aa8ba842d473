"""Kohya's layout: ``lora_unet_mid_block_1_proj_in.lora_down.weight``, read by A1111, ComfyUI and most others.

The component is a prefix, the module's path is flattened with underscores, alpha is a 0-d tensor beside the factors
and the scale is alpha / rank. Source: kohya-ss/sd-scripts ``networks/lora.py``.
"""

from __future__ import annotations

from loratools.formats import _carried, _kohya_metadata, _names, _spell, _suffixes
from loratools.formats._base import Facts, Format, Group, Scale
from loratools.formats._names import Naming

_PREFIXES = (
    ("lora_unet_unet_", "denoiser"),
    ("lora_unet_", "denoiser"),
    *_names.TEXT_ENCODERS,
    ("lora_prior_unet_", "denoiser"),
    ("lora_prior_te_", "text_encoder"),
    ("oft_unet_", "denoiser"),
    ("lycoris_", "denoiser"),
)
# OneTrainer's files for UNets are of this layout but for their OFT.
_SUFFIXES = {**_spell.FLATTENED, **_suffixes.OFT_R}
_NAMING = Naming(
    "kohya",
    "kohya",
    "_",
    {
        "denoiser": "lora_unet_",
        "text_encoder": "lora_te_",
        "text_encoder_2": "lora_te2_",
        "text_encoder_3": "lora_te3_",
    },
    seen=_names.TEXT_ENCODERS,
)


def _claims(facts: Facts) -> float:
    return facts.share(tuple(prefix for prefix, _ in _PREFIXES))


def _variant(facts: Facts) -> str:
    if facts.share(("lora_unet_unet_",)) or "glued" in facts.styles:
        return "malformed"
    return "lycoris" if facts.share(("lycoris_",)) else ""


def _scaler(group: Group, component: str, rank: int, facts: Facts) -> Scale:  # noqa: ARG001
    # Without alpha the trainers' loaders take alpha = rank.
    return Scale(1.0)


FORMAT = Format(
    name="kohya",
    title="Kohya",
    claims=_claims,
    variant=_variant,
    prefixes=_PREFIXES,
    scaler=_scaler,
    speller=_spell.flattened(_NAMING, _SUFFIXES),
    finisher=_kohya_metadata.finish,
    roles=_spell.ROLES | _suffixes.OFT_R.keys(),
    dialect=_NAMING.dialect,
    separator=_NAMING.separator,
    alpha="tensor",
    adopt=_carried.token,
)
