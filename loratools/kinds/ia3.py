"""(IA)³ (arXiv 2205.05638): the base weight's rows or columns are multiplied by a learned vector."""

from __future__ import annotations

from loratools.kinds._base import Kind

KIND = Kind(name="ia3", title="(IA)³", needs=(("ia3_l",), ("ia3_weight", "on_input")))
