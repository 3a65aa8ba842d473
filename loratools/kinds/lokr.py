"""LoKr (LyCORIS): ΔW = scale · w1 ⊗ w2, either of them whole or as a product of two factors."""

from __future__ import annotations

from loratools.kinds._base import Factors, Kind, Shape, first_axis


def _shape(factors: Factors) -> Shape | None:
    left = _factor_shape(factors, "lokr_w1")
    right = _factor_shape(factors, "lokr_w2")
    if left is None or right is None:
        return None
    kernel = factors["lokr_t2"].shape[2:] if "lokr_t2" in factors else right[2:]
    return (left[0] * right[0], left[1] * right[1], *kernel)


def _factor_shape(factors: Factors, name: str) -> Shape | None:
    if name in factors:
        return factors[name].shape
    a, b = factors.get(f"{name}_a"), factors.get(f"{name}_b")
    if a is None or b is None:
        return None
    rows = a.shape[1] if name == "lokr_w2" and "lokr_t2" in factors else a.shape[0]
    return (rows, *b.shape[1:])


KIND = Kind(
    name="lokr",
    title="LoKr",
    needs=tuple(
        (*first, *second)
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    may=("lokr_t2",),
    rank=first_axis("lokr_w1_b", "lokr_w2_b"),
    shape=_shape,
)
