"""Interpolate between the directions of two changes, and between their lengths.

    ΔW = λ · ((1 − t)·‖ΔW₁‖ + t·‖ΔW₂‖) · u,   u = (sin((1 − t)·θ)·u₁ + sin(t·θ)·u₂) / sin θ
    uᵢ = ΔWᵢ / ‖ΔWᵢ‖;   cos θ = ⟨u₁, u₂⟩;   t = w₂ / (w₁ + w₂)

Shoemake: "Animating rotation with quaternion curves", SIGGRAPH 1985; after mergekit's "nuslerp", which has no paper.

Differences from mergekit's "nuslerp":
- There directions set the angle, but the changes themselves are interpolated, as "slerp" does here; then the longer
  one leads. Here the direction moves at an even pace whatever the lengths, and the length is their weighted mean.
- The weights are relative, as there, and may have any sum, which λ makes up for. A negative one turns its change round,
  with the weight's magnitude in t; there two weights of sum 0 count as even.
- The whole matrix is one vector; there rows or columns may be interpolated one by one.
- The interpolation is linear, (1 − t)·ΔW₁ + t·ΔW₂, where the angle defines no single great circle: within 2⁻¹⁶ of
  parallel, where both are the same, or of opposite; and where one change is zero.

Two adapters at most; "karcher" is the same for more. An adapter that does not change a weight takes no part there: the
other's change comes whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.means import mean
from loratools.maths.spherical import nuslerp
from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    factors, scales = [part.factors for part in parts], [part.scale for part in parts]
    weights = [part.weight for part in parts]
    return Outcome(*mean(nuslerp, factors, scales, weights, factor=options.lam, rank=options.rank))


METHOD = Method(
    name="nuslerp",
    summary="Interpolate between the directions of two changes, and between their lengths.",
    lossless=True,
    options=(RANK, LAMBDA),
    rule=_combine,
    laws=("identity", "order-free"),
    most=2,
)
