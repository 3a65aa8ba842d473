"""ComfyUI's native layout: the base checkpoint's own dotted names under ``diffusion_model.`` and ``text_encoders.``.

Read here; the factors are spelt as in PEFT or as in Kohya's layout, alpha may be a tensor.
Source: ComfyUI ``comfy/lora.py``.
"""

from __future__ import annotations

from loratools.formats._base import Facts, Format

_PREFIXES = (
    ("model.diffusion_model.", "denoiser"),
    ("diffusion_model.", "denoiser"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2"),
    ("text_encoders.", "text_encoder"),
)


def _claims(facts: Facts) -> float:
    return 0.9 if facts.share(tuple(prefix for prefix, _ in _PREFIXES)) > 0.5 else 0.0


FORMAT = Format(name="comfy", title="ComfyUI", claims=_claims, prefixes=_PREFIXES, dialect="native")
