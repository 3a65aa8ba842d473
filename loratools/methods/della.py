"""Drop elements of each change at random, small ones more often, rescale, elect a sign per element, and average.

    p  = density + ε · (½ − (r + ½)/in),   r = 0 for the largest element of a row of ΔWᵢ … in − 1 for the smallest
    τ̂ᵢ = wᵢ · mᵢ ∘ ΔWᵢ / p,   mᵢ = 1 with probability p, else 0, for each element by itself
    γ  = sgn(Σᵢ τ̂ᵢ);  ΔW = λ · mean of { τ̂ᵢ : sgn(τ̂ᵢ) = γ } per element, 0 where γ = 0

Deep, Bhardwaj, Poria: "DELLA-Merging: reducing interference in model merging through magnitude-based sampling", arXiv
2406.11617: its steps drop (MagPrune, with ranks by row and probabilities from p_min = p − ε/2 upwards), elect and fuse.

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
- Values that agree are averaged over the adapters that have one; there the sum of their weighted values is divided by
  the sum of their weights, if at all, which negative weights can bring to 0.
- Where Σ τ̂ᵢ is 0 up to rounding no sign is elected; there the positive one.

The result has full rank. It is computed by row tiles, held only while small, and recompressed from tiles to ``rank``
(by default Σ rankᵢ); the energy reported is what that rank retains of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part
from loratools.methods._elementwise import (
    EPSILON,
    MAJORITY,
    MASK_SEED,
    RANDOM_DENSITY,
    elected,
    merged,
    sampled,
)


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    return merged(parts, options, sampled, elected(options))


METHOD = Method(
    name="della",
    summary="Drop elements of each change at random, small ones more often, rescale, elect a sign per element, and "
    "average.",
    lossless=False,
    options=(RANK, RANDOM_DENSITY, EPSILON, LAMBDA, MAJORITY, MASK_SEED),
    rule=_combine,
    laws=("order-free", "homogeneous"),
)
