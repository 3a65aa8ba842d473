"""Drop elements of each change at random, small ones more often, rescale what is left, and add it.

    p  = density + ε · (½ − (r + ½)/in),   r = 0 for the largest element of a row of ΔWᵢ … in − 1 for the smallest
    τ̂ᵢ = wᵢ · mᵢ ∘ ΔWᵢ / p,   mᵢ = 1 with probability p, else 0, for each element by itself
    ΔW = λ · Σᵢ τ̂ᵢ, whose expectation is λ · Σᵢ wᵢ·ΔWᵢ

Deep, Bhardwaj, Poria: "DELLA-Merging: reducing interference in model merging through magnitude-based sampling", arXiv
2406.11617: its MagPrune with ranks by row, which drops with probabilities from p_min = p − ε/2 upwards, without the
election; ``della`` has it.

Differences from the reference implementation:
- ε is the distance between the largest and the smallest probability, as in the paper; mergekit's "epsilon" is half of
  it.
- Probabilities are the middles of even steps, so that their mean is the density exactly and none is 0; there both ends
  are reached. They differ by at most ε/(2·in).
- Where the density is nearer than ε/2 to 0 or 1 the probabilities lie as far apart as it allows; there that is an
  error, or a warning before one.
- Equal magnitudes are ranked by position, the first as the larger.
- A mask depends on the seed, the module, the adapter's position and the element's place in ΔW, by a counter-based
  generator; there on how many numbers were drawn before.

The result has full rank. It is computed by row tiles, held only while small, and recompressed from tiles to ``rank``
(by default Σ rankᵢ); the energy reported is what that rank retains of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part
from loratools.methods._elementwise import EPSILON, MASK_SEED, RANDOM_DENSITY, merged, sampled, total


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    return merged(parts, options, sampled, total)


METHOD = Method(
    name="della-linear",
    summary="Drop elements of each change at random, small ones more often, rescale what is left, and add it.",
    lossless=False,
    options=(RANK, RANDOM_DENSITY, EPSILON, LAMBDA, MASK_SEED),
    rule=_combine,
    laws=("order-free", "linear", "homogeneous", "sum"),
)
