"""Full differences (LyCORIS ``diff``): ΔW and Δbias stored as they are, norm layers included."""

from __future__ import annotations

from loratools.kinds._base import Factors, Kind, Shape


def _shape(factors: Factors) -> Shape | None:
    return next((factors[role].shape for role in ("diff", "w_norm") if role in factors), None)


KIND = Kind(
    name="full",
    title="full difference",
    needs=(("diff",), ("diff_b",), ("w_norm",), ("b_norm",)),
    shape=_shape,
)
