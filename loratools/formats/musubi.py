"""musubi-tuner's layout: Kohya's, for the video and image transformers that it trains, without text encoders.

The names are those of the models that its code builds, which an architecture states as its dialect for this layout.
Source: kohya-ss/musubi-tuner ``networks/lora.py``.
"""

from __future__ import annotations

from loratools.formats import _carried, _kohya_metadata, _spell
from loratools.formats._base import Facts, Format
from loratools.formats._names import Naming

_NAMING = Naming(
    "musubi",
    "kohya",
    "_",
    {"denoiser": "lora_unet_"},
    todo="musubi-tuner trains the transformers of video and image models alone",
)


def _claims(facts: Facts) -> float:  # noqa: ARG001 - such files are read as Kohya's
    return 0.0


FORMAT = Format(
    name="musubi",
    title="musubi-tuner",
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
