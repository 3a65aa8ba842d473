"""LyCORIS' own layout: ``lycoris_`` before diffusers' names, flattened; text encoders as in Kohya's files.

Its wrapper saves so outside of Kohya's trainer. Reading, it is a variant of Kohya's layout.
Source: LyCORIS ``lycoris/wrapper.py`` (``LycorisNetwork``).
"""

from __future__ import annotations

from loratools.formats import _carried, _kohya_metadata, _names, _spell
from loratools.formats._base import Facts, Format
from loratools.formats._names import Naming

_NAMING = Naming(
    "lycoris",
    "diffusers",
    "_",
    {"denoiser": "lycoris_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"},
    seen=_names.TEXT_ENCODERS,
)


def _claims(facts: Facts) -> float:  # noqa: ARG001 - such files are read as Kohya's
    return 0.0


FORMAT = Format(
    name="lycoris",
    title="LyCORIS",
    claims=_claims,
    speller=_spell.flattened(_NAMING),
    finisher=_kohya_metadata.finish,
    roles=_spell.ROLES,
    dialect=_NAMING.dialect,
    separator=_NAMING.separator,
    alpha="tensor",
    adopt=_carried.token,
    reads_as=("kohya",),
)
