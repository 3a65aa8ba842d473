"""DeLoRA (arXiv 2503.18225): normalised factors with a learned bound on their strength."""

from __future__ import annotations

from loratools.kinds._base import Kind, first_axis

KIND = Kind(
    name="delora",
    title="DeLoRA",
    needs=(("delora_a", "delora_b", "delora_lambda"),),
    rank=first_axis("delora_a"),
)
