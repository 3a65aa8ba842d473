"""VeRA (arXiv 2310.11454): two learned vectors around frozen random matrices shared by all modules."""

from __future__ import annotations

from loratools.kinds._base import Kind, first_axis

KIND = Kind(
    name="vera",
    title="VeRA",
    needs=(("vera_lambda_b", "vera_lambda_d"), ("vera_a",), ("vera_b",)),
    rank=first_axis("vera_lambda_d"),
)
