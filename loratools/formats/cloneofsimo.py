"""The first LoRA files for Stable Diffusion: ``unet:0:up`` or a bare list of alternating up and down matrices.

Modules are numbered in the order in which the trainer met them; no file says which weight a number is. The scale is 1.
Trained tokens lie beside the factors under their own names. Source: cloneofsimo/lora ``lora_diffusion/lora.py``.
"""

from __future__ import annotations

from loratools.formats._base import Facts, Format

_PREFIXES = (("text_encoder:", "text_encoder"), ("unet:", "denoiser"))


def _claims(facts: Facts) -> float:
    return 1.0 if facts.sequence or facts.style == "cloneofsimo" else 0.0


FORMAT = Format(
    name="cloneofsimo",
    title="cloneofsimo/lora",
    claims=_claims,
    variant=lambda facts: "pt-list" if facts.sequence else "",
    prefixes=_PREFIXES,
    dialect="native",
)
