"""AdaLoRA (arXiv 2303.10512): ΔW = scale · up · diag(E) · down, with ranks pruned while training."""

from __future__ import annotations

from loratools.kinds._base import Factors, Kind, Shape, first_axis


def _shape(factors: Factors) -> Shape:
    return (factors["up"].shape[0], factors["down"].shape[1])


KIND = Kind(
    name="adalora",
    title="AdaLoRA",
    needs=(("up", "down", "lora_E"),),
    may=("ranknum",),
    rank=first_axis("down"),
    shape=_shape,
    specific=2,
)
