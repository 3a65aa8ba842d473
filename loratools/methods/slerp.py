"""Interpolate between two changes along the great circle through them.

    ΔW = λ · (sin((1 − t)·θ)·ΔW₁ + sin(t·θ)·ΔW₂) / sin θ,   cos θ = ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖),   t = w₂ / (w₁ + w₂)

Shoemake: "Animating rotation with quaternion curves", SIGGRAPH 1985; for the weights of models it has no paper, and
became known through mergekit. Where both changes have one length, so has the result; a linear interpolation is shorter.

Differences from mergekit's "slerp":
- The angle is that between the changes, not between the weights of whole models, which nearly always is almost 0.
- t follows from the weights. They are relative: 1 and 3 are 0.25 and 0.75, and λ sets the strength. A negative weight
  turns its change round, with the weight's magnitude in t.
- The interpolation is linear, (1 − t)·ΔW₁ + t·ΔW₂, only where the angle defines no single great circle: within 2⁻¹⁶ of
  parallel, where both are the same, or of opposite; and where one change is zero. mergekit takes it for every
  |cos θ| > 0.9995.

Two adapters at most. An adapter that does not change a weight takes no part there: the other's change comes whole. All
angles come from the factors' r x r inner products.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.means import mean
from loratools.maths.spherical import slerp
from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    factors, scales = [part.factors for part in parts], [part.scale for part in parts]
    weights = [part.weight for part in parts]
    return Outcome(*mean(slerp, factors, scales, weights, factor=options.lam, rank=options.rank))


METHOD = Method(
    name="slerp",
    summary="Interpolate between two changes along the great circle through them.",
    lossless=True,
    options=(RANK, LAMBDA),
    rule=_combine,
    laws=("identity", "order-free"),
    most=2,
)
