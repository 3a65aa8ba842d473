"""Bring the changes into one basis, then trim, elect signs and average their components there.

    τᵢ = wᵢ·ΔWᵢ;  [τ₁ … τ_T] = U·Σ·[V₁ᵀ … V_Tᵀ];  Pᵢ = Σ·Vᵢᵀ = Uᵀ·τᵢ
    P̂ᵢ = Pᵢ where |Pᵢ| is among the top ``density`` of its elements, else 0;  γ = sgn(Σᵢ P̂ᵢ)
    ΔW = λ·U·(mean of { P̂ᵢ : sgn(P̂ᵢ) = γ } per element, 0 where γ = 0)

Stoica and others: "Model merging with SVD to tie the KnOTS", arXiv 2410.19735; Yadav and others: "TIES-merging",
arXiv 2306.01708.

Differences from the reference implementation:
- Trimming is per module; there it is over the components of all modules together, where small ones may vanish.
- The weights multiply the changes before anything else, so they take part in the basis and in the election.
- Singular values above rounding count, σ > σ₁ · max(shape) · eps; there those above 1e-5, whatever the scale.
- Where Σ P̂ᵢ is 0 up to rounding no sign is elected; there the majority sign of the whole model is taken.
- Exactly density · numel elements (rounded half up, at least one) are kept, ties broken by position.

The basis has k ≤ min(out, Σ rankᵢ) vectors, so the result's rank is at most k and nothing is approximated without
``rank``. Components are (k, in) and made by row tiles: memory is that of a few of them whatever the number of
adapters, time (out + in)·(Σ rankᵢ)² + k·in·Σ rankᵢ. Where Σ rankᵢ reaches min(out, in) they are as large as ΔW, and
no larger.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.elect import elected_mean
from loratools.methods._base import DENSITY, LAMBDA, RANK, Method, Options, Outcome, Part
from loratools.methods._core_space import merged_knots
from loratools.methods._elementwise import trimmed


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    return merged_knots(parts, options, trimmed, elected_mean)


METHOD = Method(
    name="knots-ties",
    summary="Bring the changes into one basis, then trim, elect signs and average their components there.",
    lossless=True,
    options=(RANK, DENSITY, LAMBDA),
    rule=_combine,
    laws=("order-free", "homogeneous"),
)
