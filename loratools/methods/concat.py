"""Put the factors side by side: the exact weighted sum at the summed rank, without any decomposition.

    up = [sqrt|w₁|·sgn(w₁)·up₁ … ],  down = [sqrt|w₁|·down₁; … ],  ΔW = up @ down = Σᵢ wᵢ·ΔWᵢ

Prabhakar and others: "LoRA Soups", arXiv 2410.13025 (there with learned weights); PEFT's "cat".

PEFT puts the whole weight into one factor, and its weights cannot be negative. Ours splits the weight evenly,
so that both sides keep their magnitude in half precision. The rank is always Σ rankᵢ; "linear" gives the same
matrix at its numerical rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.lowrank import stack
from loratools.methods._base import Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], _options: Options) -> Outcome:
    if len(parts) == 1 and parts[0].multiplier == 1.0:
        return Outcome(parts[0].factors)
    return Outcome(stack([part.factors for part in parts], [part.multiplier for part in parts]))


METHOD = Method(
    name="concat",
    summary="Put the factors side by side: the exact weighted sum at the summed rank.",
    lossless=True,
    options=(),
    rule=_combine,
    laws=("identity", "order-free", "linear", "homogeneous", "sum"),
)
