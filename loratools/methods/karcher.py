"""Average the directions of several changes on the sphere, and their lengths.

    u = argmin over ‖u‖ = 1 of Σ pᵢ·∠(u, uᵢ)²;   uᵢ = ΔWᵢ / ‖ΔWᵢ‖;   pᵢ = |wᵢ| / Σ|wⱼ|;   ΔW = λ · (Σ pᵢ·‖ΔWᵢ‖) · u

Karcher: "Riemannian center of mass and mollifier smoothing", 1977; Buss, Fillmore: "Spherical averages and applications
to spherical splines and interpolation", 2001, whose iteration u ← exp_u(Σ pᵢ·log_u(uᵢ)) is used. Of two changes it is
"nuslerp"; its first step from the normalised sum is "multislerp".

Differences from mergekit's "karcher":
- The iteration runs on coefficients of the changes, until it moves by less than 10⁻¹² (radians), at most 200 times;
  there on the matrices, until 10⁻⁵, at most 10 times.
- Adapters may have weights, which are relative; there all count alike. A negative weight turns its change round and
  enters the shares with its magnitude. λ sets the strength.
- Where the directions balance out (‖Σ pᵢuᵢ‖ < 2⁻¹⁶) there is no mean to begin from, and the weighted mean Σ pᵢ·ΔWᵢ is
  taken; there the first change's direction.

The mean is unique where all directions lie within 90° of one point; beyond that it is a nearby local one. A zero change
has no direction and counts with its share in the mean length. An adapter that does not change a weight takes no part
there, neither in the shares nor in the length.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.means import mean
from loratools.maths.spherical import karcher
from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    factors, scales = [part.factors for part in parts], [part.scale for part in parts]
    weights = [part.weight for part in parts]
    return Outcome(*mean(karcher, factors, scales, weights, factor=options.lam, rank=options.rank))


METHOD = Method(
    name="karcher",
    summary="Average the directions of several changes on the sphere, and their lengths.",
    lossless=True,
    options=(RANK, LAMBDA),
    rule=_combine,
    laws=("identity", "order-free"),
)
