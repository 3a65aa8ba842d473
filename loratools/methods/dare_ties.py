"""Drop most elements of each change at random, rescale what is left, elect a sign per element, and average.

    τ̂ᵢ = wᵢ · mᵢ ∘ ΔWᵢ / density,   mᵢ = 1 with probability ``density``, else 0, for each element by itself
    γ  = sgn(Σᵢ τ̂ᵢ);  ΔW = λ · mean of { τ̂ᵢ : sgn(τ̂ᵢ) = γ } per element, 0 where γ = 0

Yu and others: "Language models are Super Mario: absorbing abilities from homologous models as a free lunch" (DARE),
arXiv 2311.03099, whose drop rate p is 1 − density; Yadav and others: "TIES-merging", arXiv 2306.01708, whose trimming
the random masks take the place of.

Differences from the reference implementations:
- A mask depends on the seed, the module, the adapter's position and the element's place in ΔW, by a counter-based
  generator; there on how many numbers were drawn before.
- Values that agree are averaged over the adapters that have one, as in TIES; mergekit's "dare_ties" adds them unless
  told to normalise, and then divides by the sum of the weights.
- Where Σ τ̂ᵢ is 0 up to rounding no sign is elected; PEFT and mergekit take the positive one.
- What is thinned is ΔW; PEFT thins, elects and averages up and down by themselves.

The result has full rank. It is computed by row tiles, held only while small, and recompressed from tiles to ``rank``
(by default Σ rankᵢ); the energy reported is what that rank retains of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part
from loratools.methods._elementwise import MAJORITY, MASK_SEED, RANDOM_DENSITY, dropped, elected, merged


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    return merged(parts, options, dropped, elected(options))


METHOD = Method(
    name="dare-ties",
    summary="Drop most elements of each change at random, rescale what is left, elect a sign per element, and average.",
    lossless=False,
    options=(RANK, RANDOM_DENSITY, LAMBDA, MAJORITY, MASK_SEED),
    rule=_combine,
    laws=("order-free", "homogeneous"),
)
