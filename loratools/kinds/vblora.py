"""VB-LoRA (arXiv 2405.15179): factors composed of vectors from a shared bank."""

from __future__ import annotations

from loratools.kinds._base import Kind

KIND = Kind(name="vblora", title="VB-LoRA", needs=(("vblora_logits_a", "vblora_logits_b"),))
