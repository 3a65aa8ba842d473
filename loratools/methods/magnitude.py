"""Keep the largest elements of each change and add them.

    τ̂ᵢ = wᵢ·ΔWᵢ where |ΔWᵢ| is among the top ``density`` of its elements, else 0;  ΔW = λ · Σᵢ τ̂ᵢ

Magnitude pruning of task vectors is the first step of TIES (Yadav and others: "TIES-merging", arXiv 2306.01708), here
without the election; PEFT has it as "magnitude_prune".

Differences from PEFT, which prunes up and down by themselves:
- What is trimmed is ΔW: a product of pruned factors is neither sparse nor made of the largest elements.
- Exactly density · numel elements (rounded half up, at least one) are kept, ties broken by position.
- Weights multiply ΔW; there the square root of their magnitude multiplies both factors.

The result has full rank. It is computed by row tiles, held only while small, and recompressed from tiles to ``rank``
(by default Σ rankᵢ); the energy reported is what that rank retains of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.methods._base import DENSITY, LAMBDA, RANK, SEED, Method, Options, Outcome, Part
from loratools.methods._elementwise import merged, total, trimmed


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    return merged(parts, options, trimmed, total)


METHOD = Method(
    name="magnitude",
    summary="Keep the largest elements of each change and add them.",
    lossless=False,
    options=(RANK, DENSITY, LAMBDA, SEED),
    rule=_combine,
    laws=("order-free", "linear", "homogeneous", "sum"),
)
