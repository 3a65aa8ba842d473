"""GLoRA (arXiv 2306.07967): ΔW = scale · (b1 b2 + W a1 a2); it needs the base weight."""

from __future__ import annotations

from loratools.kinds._base import Kind, first_axis

KIND = Kind(
    name="glora",
    title="GLoRA",
    needs=(("glora_a1", "glora_a2", "glora_b1", "glora_b2"),),
    may=("glora_bm",),
    rank=first_axis("glora_a2"),
)
