"""Uni-LoRA (arXiv 2506.00799): one trained vector, from which all modules' factors are projected."""

from __future__ import annotations

from loratools.kinds._base import Kind

KIND = Kind(name="unilora", title="Uni-LoRA", needs=(("unilora_theta",),))
