"""Remove the very largest and the small elements of each change, elect a sign per element, and average the rest.

    τ̂ᵢ = wᵢ·ΔWᵢ where |ΔWᵢ| is among the top ``density`` of its elements but for the top ``gamma``, else 0
    γ  = sgn(Σᵢ τ̂ᵢ);  ΔW = λ · mean of { τ̂ᵢ : sgn(τ̂ᵢ) = γ } per element, 0 where γ = 0

Davari, Belilovsky: "Model breadcrumbs: scaling multi-task model merging with sparse masks", arXiv 2312.06795, whose
masks take the place of the trimming in Yadav and others: "TIES-merging", arXiv 2306.01708. The combination is
mergekit's.

Differences from the papers and mergekit's implementation:
- ``density`` is the fraction kept, counted below the removed top: ranks gamma · numel … (gamma + density) · numel by
  descending magnitude. The paper gives the fractions masked at both ends.
- Where density + gamma exceeds 1, fewer are removed at the top, as in mergekit: at density 1 nothing is.
- Counts are exact (rounded half up, at least one kept), ties broken by position.
- Values that agree are averaged over the adapters that have one, as in TIES; mergekit adds them unless told to
  normalise, and then divides by the sum of the weights.
- Where Σ τ̂ᵢ is 0 up to rounding no sign is elected; there the positive one.

The result has full rank. It is computed by row tiles, held only while small, and recompressed from tiles to ``rank``
(by default Σ rankᵢ); the energy reported is what that rank retains of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.methods._base import DENSITY, LAMBDA, RANK, SEED, Method, Options, Outcome, Part
from loratools.methods._elementwise import GAMMA, MAJORITY, banded, elected, merged


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    return merged(parts, options, banded, elected(options))


METHOD = Method(
    name="breadcrumbs-ties",
    summary="Remove the very largest and the small elements of each change, elect a sign per element, and average the "
    "rest.",
    lossless=False,
    options=(
        RANK,
        replace(DENSITY, help="Fraction of each ΔW's elements kept, the largest that follow those removed."),
        GAMMA,
        LAMBDA,
        MAJORITY,
        SEED,
    ),
    rule=_combine,
    laws=("order-free", "homogeneous"),
)
