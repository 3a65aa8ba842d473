"""LoRA on fused experts: one pair of factors for all experts of a layer, stacked in three axes or packed in two.

PEFT's ``target_parameters`` packs down as (experts · rank, in) expert-major and up as (out, rank · experts)
rank-major, so that multiplying them as they lie gives no expert's ΔW.
"""

from __future__ import annotations

from loratools.kinds._base import Kind

# Readers assign this kind by the shape of the factors or by the configuration; no role is its own.
KIND = Kind(name="experts", title="LoRA on fused experts", needs=(("up", "down"),), specific=0)
