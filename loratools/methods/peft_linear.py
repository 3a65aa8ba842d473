"""Add the factors themselves, as PEFT's "linear" does: for compatibility alone, since it adds cross terms.

    cᵢ = wᵢ·scaleᵢ;  up = Σᵢ sqrt|cᵢ|·upᵢ,  down = Σᵢ sgn(cᵢ)·sqrt|cᵢ|·downᵢ,  ΔW = up @ down

Source: PEFT 0.21, ``LoraModel.add_weighted_adapter(combination_type="linear")``. It exists to match an adapter that was
merged so. ΔW = Σᵢ cᵢ·upᵢ@downᵢ + Σ_{i≠j} sgn(cⱼ)·sqrt|cᵢcⱼ|·upᵢ@downⱼ, of which the first sum alone is the merged
change: "linear" gives that. The others are products of one adapter's up with another's down, which none contains.

What is as there: the rank is that of the inputs, which must be equal; weights are float32; factors of half precision
are computed with in float32, as PEFT loads them. What differs:
- The result is stored in the inputs' own dtype; PEFT writes float32, as --dtype float32 does here.
- An adapter of weight 0 is absent. It makes no difference in this method.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.methods._base import Method, Options, Outcome, Part
from loratools.methods._factorwise import joined, weighted_sum


def _combine(parts: Sequence[Part], _options: Options) -> Outcome:
    return joined(parts, weighted_sum)


METHOD = Method(
    name="peft-linear",
    summary="Add the factors themselves, as PEFT's linear does: for compatibility alone, since it adds cross terms.",
    # A module of one input goes through the same arithmetic, so that its factors are PEFT's, too.
    lossless=False,
    options=(),
    rule=_combine,
)
