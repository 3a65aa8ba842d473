"""Drop most elements of each change at random, rescale what is left, and add it.

    τ̂ᵢ = wᵢ · mᵢ ∘ ΔWᵢ / density,   mᵢ = 1 with probability ``density``, else 0, for each element by itself
    ΔW = λ · Σᵢ τ̂ᵢ, whose expectation is λ · Σᵢ wᵢ·ΔWᵢ

Yu and others: "Language models are Super Mario: absorbing abilities from homologous models as a free lunch" (DARE),
arXiv 2311.03099, whose drop rate p is 1 − density.

Differences from the reference implementations:
- A mask depends on the seed, the module, the adapter's position and the element's place in ΔW, by a counter-based
  generator; there on how many numbers were drawn before.
- What is thinned is ΔW; PEFT's "dare_linear" thins up and down by themselves, so that density² is left of the products
  that an element is the sum of.

The result has full rank. It is computed by row tiles, held only while small, and recompressed from tiles to ``rank``
(by default Σ rankᵢ); the energy reported is what that rank retains of it. What is lost is mostly noise that thinning
added.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part
from loratools.methods._elementwise import MASK_SEED, RANDOM_DENSITY, dropped, merged, total


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    return merged(parts, options, dropped, total)


METHOD = Method(
    name="dare-linear",
    summary="Drop most elements of each change at random, rescale what is left, and add it.",
    lossless=False,
    options=(RANK, RANDOM_DENSITY, LAMBDA, MASK_SEED),
    rule=_combine,
    laws=("order-free", "linear", "homogeneous", "sum"),
)
