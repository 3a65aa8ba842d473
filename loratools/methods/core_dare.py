"""Bring the changes into the small space that all of them span, drop most elements at random, and add the rest.

    τᵢ = wᵢ·ΔWᵢ = L·Mᵢ·Rᵀ;  L, R the left singular vectors of the stacked factors of all τᵢ
    ΔW = λ·L·(Σᵢ mᵢ ∘ Mᵢ / density)·Rᵀ,   mᵢ = 1 with probability ``density``, else 0, for each element by itself

Panariello and others: "Accurate and efficient low-rank model merging in core space", arXiv 2509.17786; Yu and
others: "Language models are Super Mario" (DARE), arXiv 2311.03099, whose drop rate is 1 − density.

Differences from the reference implementation:
- The bases are those of the factors after each τᵢ has been written as √σ·u, √σ·v; there of the factors as they are
  in the file, whose magnitudes are shared between up, down and alpha by chance.
- A mask depends on the seed, the module, the adapter's position and the element's place in Mᵢ, by a counter-based
  generator; there on how many numbers were drawn before.
- The weights multiply the changes before anything else, so they take part in the bases.
- Directions beyond the numerical rank are not part of the space.

Cores are (p, q) with p ≤ min(out, Σ rankᵢ), q ≤ min(in, Σ rankᵢ), made by row tiles; the result's rank is at most
min(p, q), so nothing is approximated without ``rank``. Where Σ rankᵢ reaches min(out, in) a core is as large as ΔW
on that side, and no larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.methods._base import DENSITY, LAMBDA, RANK, SEED, Method, Options, Outcome, Part
from loratools.methods._core_space import merged_cores
from loratools.methods._elementwise import dropped, total


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    return merged_cores(parts, options, dropped, total)


METHOD = Method(
    name="core-dare",
    summary="Bring the changes into the small space that all of them span, drop most elements at random, and add the "
    "rest.",
    lossless=True,
    options=(
        RANK,
        replace(DENSITY, help="Fraction of each core's elements kept, at random."),
        LAMBDA,
        replace(SEED, help="Seed of the random masks."),
    ),
    rule=_combine,
    laws=("order-free", "homogeneous", "sum"),
)
