"""MiSS, formerly Bone (arXiv 2409.15371): a small block that is repeated over the weight."""

from __future__ import annotations

from loratools.kinds._base import Kind, first_axis

KIND = Kind(name="miss", title="MiSS", needs=(("miss_block",),), rank=first_axis("miss_block"))
