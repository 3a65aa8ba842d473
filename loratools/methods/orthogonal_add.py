"""Add the changes one after the other, each without what lies along those before it.

    τᵢ = wᵢ·ΔWᵢ;   ΔW = Σᵢ τᵢ⊥,   τᵢ⊥ = τᵢ less its projection onto span(τ₁ … τᵢ₋₁)

Gram's and Schmidt's orthogonalisation of matrices as vectors, with ⟨A, B⟩ = tr(AᵀB); for two adapters it is the sum
with sd-mecha's "perpendicular component" of the second, τ₂ − ⟨τ₂, τ₁⟩/⟨τ₁, τ₁⟩·τ₁. There is no paper.

The order of the adapters matters: the first stays as it is, and nothing that follows makes it stronger or weaker,
⟨ΔW, τ₁⟩ = ‖τ₁‖². What repeats an earlier change adds nothing, nor does what negates it: A with −A gives A. Of more than
two adapters each is orthogonal to every earlier one, which orthogonality to their sum would not make it.

The weights multiply the changes; their signs matter only to what is left. A change that lies in the span of the earlier
ones within 2⁻¹⁶ of its length is left out. Adapters that do not change a weight are no members of its sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.means import gram_of, orthogonal_addition, weighted_sum
from loratools.methods._base import RANK, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    ordered = sorted(parts, key=lambda part: part.source)
    factors, multipliers = [part.factors for part in ordered], [part.multiplier for part in ordered]
    shares = orthogonal_addition(gram_of(factors, multipliers)) if len(ordered) > 1 else [1.0]
    coefficients = [float(share) * by for share, by in zip(shares, multipliers, strict=True)]
    return Outcome(*weighted_sum(factors, coefficients, options.rank))


METHOD = Method(
    name="orthogonal-add",
    summary="Add the changes one after the other, each without what lies along those before it.",
    lossless=True,
    options=(RANK,),
    rule=_combine,
    laws=("identity", "homogeneous"),
)
