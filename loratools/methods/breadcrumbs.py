"""Remove the very largest and the small elements of each change, and add the rest.

    τ̂ᵢ = wᵢ·ΔWᵢ where |ΔWᵢ| is among the top ``density`` of its elements but for the top ``gamma``, else 0
    ΔW = λ · Σᵢ τ̂ᵢ

Davari, Belilovsky: "Model breadcrumbs: scaling multi-task model merging with sparse masks", arXiv 2312.06795, which
masks outliers and negligible perturbations layer by layer.

Differences from the paper and mergekit's implementation:
- ``density`` is the fraction kept, counted below the removed top: ranks gamma · numel … (gamma + density) · numel by
  descending magnitude. The paper gives the fractions masked at both ends.
- Where density + gamma exceeds 1, fewer are removed at the top, as in mergekit: at density 1 nothing is.
- Counts are exact (rounded half up, at least one kept), ties broken by position.

The result has full rank. It is computed by row tiles, held only while small, and recompressed from tiles to ``rank``
(by default Σ rankᵢ); the energy reported is what that rank retains of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.methods._base import DENSITY, LAMBDA, RANK, SEED, Method, Options, Outcome, Part
from loratools.methods._elementwise import GAMMA, banded, merged, total


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    return merged(parts, options, banded, total)


METHOD = Method(
    name="breadcrumbs",
    summary="Remove the very largest and the small elements of each change, and add the rest.",
    lossless=False,
    options=(
        RANK,
        replace(DENSITY, help="Fraction of each ΔW's elements kept, the largest that follow those removed."),
        GAMMA,
        LAMBDA,
        SEED,
    ),
    rule=_combine,
    laws=("order-free", "linear", "homogeneous", "sum"),
)
