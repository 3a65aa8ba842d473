"""LoHa (arXiv 2108.06098, LyCORIS): ΔW = scale · (w1_a w1_b) ∘ (w2_a w2_b)."""

from __future__ import annotations

from loratools.kinds._base import Factors, Kind, Shape, first_axis


def _shape(factors: Factors) -> Shape | None:
    first, second = factors["hada_w1_a"], factors["hada_w1_b"]
    if "hada_t1" in factors:
        return (first.shape[1], second.shape[1], *factors["hada_t1"].shape[2:])
    return (first.shape[0], second.shape[1])


KIND = Kind(
    name="loha",
    title="LoHa",
    needs=(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    may=("hada_t1", "hada_t2"),
    rank=first_axis("hada_w1_b"),
    shape=_shape,
)
