"""Take the change that is nearest to all changes together, so that outliers do not pull it far.

    ΔW = λ · argmin over X of Σ pᵢ·‖X − sgn(wᵢ)·ΔWᵢ‖_F,   pᵢ = |wᵢ| / Σ|wⱼ|

Weiszfeld: "Sur le point pour lequel la somme des distances de n points donnés est minimum", 1937; Vardi, Zhang: "The
multivariate L1-median and associated data depth", 2000, for iterates that meet one of the points. Among three or more
changes a few that are far away move it little, where they would move a mean without bound.

The weights are relative, and count as multiplicities: 2 is the same as naming an adapter twice. One with more than half
of all weight is the median. A negative weight turns its change round. λ sets the strength. Where the median is not
unique, as between two adapters of equal weight, the iteration from the weighted mean decides: there the mean itself.

The median is a weighted sum of the changes; its weights come from the distances, and those from the factors' inner
products. A zero change is one of the points. An adapter that does not change a weight takes no part there.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.means import geometric_median, mean
from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    factors, scales = [part.factors for part in parts], [part.scale for part in parts]
    weights = [part.weight for part in parts]
    return Outcome(*mean(geometric_median, factors, scales, weights, factor=options.lam, rank=options.rank))


METHOD = Method(
    name="geometric-median",
    summary="Take the change that is nearest to all changes together, so that outliers do not pull it far.",
    lossless=True,
    options=(RANK, LAMBDA),
    rule=_combine,
    laws=("identity", "order-free"),
)
