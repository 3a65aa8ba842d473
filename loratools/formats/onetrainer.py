"""OneTrainer's mixed layout: Kohya's flattening with diffusers' names under ``lora_transformer_``. Read here."""

from __future__ import annotations

from loratools.formats._base import Facts, Format

_PREFIXES = (
    ("lora_transformer_", "denoiser"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
)


def _claims(facts: Facts) -> float:
    return 1.1 if facts.share(("lora_transformer_",)) > 0 else 0.0


FORMAT = Format(name="onetrainer", title="OneTrainer", claims=_claims, prefixes=_PREFIXES)
