"""Trim each change, elect a sign per element, and average the changes that agree with it.

    τᵢ = wᵢ·ΔWᵢ;  τ̂ᵢ = τᵢ where |τᵢ| is among the top ``density`` of its elements, else 0
    γ  = sgn(Σᵢ τ̂ᵢ);  ΔW = λ · mean of { τ̂ᵢ : sgn(τ̂ᵢ) = γ } per element, 0 where γ = 0

Yadav and others: "TIES-merging: resolving interference when merging models", arXiv 2306.01708.

Differences from the reference implementation, which merges whole models flattened to one vector each:
- Trimming is per module, so that every weight keeps its share; there it is over the whole checkpoint, where
  modules of small magnitude may vanish.
- Weights enter with the task vectors, τᵢ = wᵢ·ΔWᵢ, so that one adapter with weight w gives w·trim(ΔW) and a
  negative weight negates; the paper has no weights.
- Where Σ τ̂ᵢ is 0 no sign is elected, as in the paper's formula; there the majority sign of the whole model is
  taken. A sum below 2⁻⁴⁰ of the sum of magnitudes is 0, so that the order of the adapters elects nothing.
- ``majority`` "frequency" elects γ = sgn(Σᵢ sgn(τ̂ᵢ)) instead, by the number of adapters, as PEFT offers.
- Exactly density · numel elements (rounded half up, at least one) are kept, ties broken by position.
PEFT's "ties" trims and elects on the factors, whose products are not the trimmed and elected ΔW.

The result has full rank. It is computed by row tiles, held only while small, and recompressed from tiles to
``rank`` (by default Σ rankᵢ); the energy reported is what that rank retains of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.methods._base import DENSITY, LAMBDA, RANK, SEED, Method, Options, Outcome, Part
from loratools.methods._elementwise import MAJORITY, elected, merged, trimmed


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    return merged(parts, options, trimmed, elected(options))


METHOD = Method(
    name="ties",
    summary="Trim each change, elect a sign per element, and average the changes that agree with it.",
    lossless=False,
    options=(RANK, DENSITY, LAMBDA, MAJORITY, SEED),
    rule=_combine,
    laws=("order-free", "homogeneous"),
)
