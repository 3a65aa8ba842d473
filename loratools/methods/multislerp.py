"""Average the directions of several changes in the tangent space at their mean, and their lengths.

    uᵢ = ΔWᵢ / ‖ΔWᵢ‖;   pᵢ = |wᵢ| / Σ|wⱼ|;   m = Σ pᵢuᵢ / ‖Σ pᵢuᵢ‖
    v = Σ pᵢ·log_m(uᵢ),   log_m(u) = θ/sin θ · (u − cos θ·m),   cos θ = ⟨u, m⟩
    ΔW = λ · (Σ pᵢ·‖ΔWᵢ‖) · (cos‖v‖·m + sin‖v‖·v/‖v‖)

After mergekit's "multislerp", which has no paper; the mean logarithm is the first step towards the spherical average of
Buss and Fillmore (2001), which "karcher" takes to its end. Of two changes it is "nuslerp".

Differences from mergekit's "multislerp":
- There the directions are projected onto the tangent space, log_m(u) = u − cos θ·m. The weighted sum of those is Σ pᵢuᵢ
  without its part along m, which is 0: the result is always m at the mean length. The logarithm keeps the angles.
- A negative weight turns its change round and enters the shares with its magnitude.
- Where the directions balance out (‖Σ pᵢuᵢ‖ < 2⁻¹⁶) the weighted mean Σ pᵢ·ΔWᵢ is taken for any number of adapters;
  there more than two are an error.

The weights are relative; λ sets the strength. A zero change has no direction and counts with its share in the mean
length. An adapter that does not change a weight takes no part there, neither in the shares nor in the length.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.means import mean
from loratools.maths.spherical import multislerp
from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    factors, scales = [part.factors for part in parts], [part.scale for part in parts]
    weights = [part.weight for part in parts]
    return Outcome(*mean(multislerp, factors, scales, weights, factor=options.lam, rank=options.rank))


METHOD = Method(
    name="multislerp",
    summary="Average the directions of several changes in the tangent space at their mean, and their lengths.",
    lossless=True,
    options=(RANK, LAMBDA),
    rule=_combine,
    laws=("identity", "order-free"),
)
