"""Average the changes in the basis that they share, which is their plain mean.

    [ΔW₁ … ΔW_T] = U·[P₁ … P_T],   ΔW = U·(1/T)·Σᵢ Pᵢ = (1/T)·Σᵢ wᵢ·ΔWᵢ

Stoica and others: "Model merging with SVD to tie the KnOTS", arXiv 2410.19735.

The weights multiply the changes before anything else, and T counts the adapters of weight other than 0. A mean of
coordinates is the mean of what they stand for, so no basis is computed here: the sum is taken of the stacked
factors, exactly, at its numerical rank or at the best approximation of the rank asked for. The reference
implementation arrives at the same matrix through the basis, in float32, without directions of singular values up to
1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.lowrank import compress, stack
from loratools.methods._base import RANK, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    if len(parts) == 1 and parts[0].multiplier == 1.0 and options.rank is None:
        return Outcome(parts[0].factors)
    count = len(parts)
    mean = stack([part.factors for part in parts], [part.multiplier / count for part in parts])
    compressed = compress(mean, options.rank)
    return Outcome(compressed.factors, compressed.energy, compressed.square)


METHOD = Method(
    name="knots-mean",
    summary="Average the changes in the basis that they share, which is their plain mean.",
    lossless=True,
    options=(RANK,),
    rule=_combine,
    laws=("identity", "order-free", "homogeneous"),
)
