"""OFT and BOFT (arXiv 2306.07280, 2311.06243): the base weight is multiplied by an orthogonal matrix."""

from __future__ import annotations

from loratools.kinds._base import Kind

KIND = Kind(
    name="oft",
    title="OFT",
    needs=(("oft_blocks",), ("oft_diag",), ("oft_r",), ("boft_r",)),
    may=("rescale", "oft_s", "boft_s"),
)
