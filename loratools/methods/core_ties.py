"""Bring the changes into the small space that all of them span, then trim, elect signs and average there.

    τᵢ = wᵢ·ΔWᵢ = L·Mᵢ·Rᵀ;  L, R the left singular vectors of the stacked factors of all τᵢ
    M̂ᵢ = Mᵢ where |Mᵢ| is among the top ``density`` of its elements, else 0;  γ = sgn(Σᵢ M̂ᵢ)
    ΔW = λ·L·(mean of { M̂ᵢ : sgn(M̂ᵢ) = γ } per element, 0 where γ = 0)·Rᵀ

Panariello and others: "Accurate and efficient low-rank model merging in core space", arXiv 2509.17786; Yadav and
others: "TIES-merging", arXiv 2306.01708.

Differences from the reference implementation:
- The bases are those of the factors after each τᵢ has been written as √σ·u, √σ·v; there of the factors as they are
  in the file. An element-wise rule depends on the bases, and how a trainer or a converter shares the magnitude
  between up, down and alpha must not change a merge.
- The weights multiply the changes before anything else, so they take part in the bases and in the election.
- Directions beyond the numerical rank are not part of the space; there their zeros count among the elements.
- Where Σ M̂ᵢ is 0 up to rounding no sign is elected; there the majority sign of the module is taken.
- Exactly density · numel elements (rounded half up, at least one) are kept, ties broken by position.

Cores are (p, q) with p ≤ min(out, Σ rankᵢ), q ≤ min(in, Σ rankᵢ), made by row tiles; the result's rank is at most
min(p, q), so nothing is approximated without ``rank``. Where Σ rankᵢ reaches min(out, in) a core is as large as ΔW
on that side, and no larger.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.elect import elected_mean
from loratools.methods._base import DENSITY, LAMBDA, RANK, Method, Options, Outcome, Part
from loratools.methods._core_space import merged_cores
from loratools.methods._elementwise import trimmed


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    return merged_cores(parts, options, trimmed, elected_mean)


METHOD = Method(
    name="core-ties",
    summary="Bring the changes into the small space that all of them span, then trim, elect signs and average there.",
    lossless=True,
    options=(RANK, DENSITY, LAMBDA),
    rule=_combine,
    laws=("order-free", "homogeneous"),
)
