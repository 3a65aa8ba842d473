"""OneTrainer's layout: Kohya's flattening with diffusers' names, ``lora_transformer_`` before transformers'.

For UNets it is Kohya's own prefix, with diffusers' names there too.
Source: Nerogar/OneTrainer ``modules/module/LoRAModule.py``.
"""

from __future__ import annotations

from loratools.formats import _carried, _kohya_metadata, _names, _spell, _suffixes
from loratools.formats._base import Facts, Format
from loratools.formats._names import Naming

_PREFIXES = (
    ("lora_transformer_", "denoiser"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
)
_SUFFIXES = {**_spell.FLATTENED, **_suffixes.OFT_R}
_NAMING = Naming(
    "onetrainer",
    "diffusers",
    "_",
    {component: prefix for prefix, component in _PREFIXES},
    seen=_names.TEXT_ENCODERS,
)


def _claims(facts: Facts) -> float:
    return 1.1 if facts.share(("lora_transformer_",)) > 0 else 0.0


FORMAT = Format(
    name="onetrainer",
    title="OneTrainer",
    claims=_claims,
    prefixes=_PREFIXES,
    speller=_spell.flattened(_NAMING, _SUFFIXES),
    finisher=_kohya_metadata.finish,
    roles=_spell.ROLES | _suffixes.OFT_R.keys(),
    dialect=_NAMING.dialect,
    separator=_NAMING.separator,
    alpha="tensor",
    adopt=_carried.token,
    # What it writes for a UNet has Kohya's prefixes alone.
    reads_as=("kohya",),
)
