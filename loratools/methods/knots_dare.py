"""Bring the changes into one basis, drop most of their components at random, and add what is left, rescaled.

    τᵢ = wᵢ·ΔWᵢ;  [τ₁ … τ_T] = U·Σ·[V₁ᵀ … V_Tᵀ];  Pᵢ = Σ·Vᵢᵀ = Uᵀ·τᵢ
    ΔW = λ·U·Σᵢ mᵢ ∘ Pᵢ / density,   mᵢ = 1 with probability ``density``, else 0, for each element by itself

Stoica and others: "Model merging with SVD to tie the KnOTS", arXiv 2410.19735; Yu and others: "Language models are
Super Mario" (DARE), arXiv 2311.03099, whose drop rate is 1 − density.

Differences from the reference implementation:
- It thins the components and then elects signs as TIES does (KnOTS-DARE-TIES); this is DARE alone, whose
  expectation is the sum of the changes. ``knots-ties`` has the election.
- A mask depends on the seed, the module, the adapter's position and the element's place in Pᵢ, by a counter-based
  generator; there on how many numbers were drawn before.
- The weights multiply the changes before anything else, so they take part in the basis.
- Singular values above rounding count, σ > σ₁ · max(shape) · eps; there those above 1e-5, whatever the scale.

The basis has k ≤ min(out, Σ rankᵢ) vectors, so the result's rank is at most k and nothing is approximated without
``rank``. Components are (k, in) and made by row tiles: memory is that of a few of them whatever the number of
adapters. Where Σ rankᵢ reaches min(out, in) they are as large as ΔW, and no larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.methods._base import DENSITY, LAMBDA, RANK, SEED, Method, Options, Outcome, Part
from loratools.methods._core_space import merged_knots
from loratools.methods._elementwise import dropped, total


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    return merged_knots(parts, options, dropped, total)


METHOD = Method(
    name="knots-dare",
    summary="Bring the changes into one basis, drop most of their components at random, and add what is left, "
    "rescaled.",
    lossless=True,
    options=(
        RANK,
        replace(DENSITY, help="Fraction of each ΔW's components kept, at random."),
        LAMBDA,
        replace(SEED, help="Seed of the random masks."),
    ),
    rule=_combine,
    laws=("order-free", "homogeneous", "sum"),
)
