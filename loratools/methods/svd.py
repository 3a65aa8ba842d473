"""Add the changes and keep the strongest directions: the nearest matrix of a low rank to the weighted sum.

    ΔW = trunc_k(Σᵢ wᵢ·ΔWᵢ),   trunc_k the truncated singular value decomposition

PEFT's "svd" of ``add_weighted_adapter``; by Eckart and Young (1936) no matrix of rank k is nearer to the sum. k is
``rank``, or the largest rank among the adapters that change this weight, so that the result is no larger than they are.

Differences from PEFT, which decomposes the full sum in the adapters' own dtype and puts all of Σ into up:
- The sum is never formed: its decomposition comes from the factors, exactly and in float64.
- √Σ goes to both sides, so that both keep their magnitude in half precision.
- Nothing is clamped.

"linear" is the same sum, whole where no rank is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.maths.means import weighted_sum
from loratools.methods._base import RANK, Method, Options, Outcome, Part
from loratools.methods._sums import sums


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    rank, whole = _rank(parts, options)
    factors = [part.factors for part in parts]
    return Outcome(*weighted_sum(factors, [part.multiplier for part in parts], None if whole else rank))


def _batched(batch: Sequence[Sequence[Part]], options: Options) -> list[Outcome]:
    rank, whole = _rank(batch[0], options)
    return [_combine(parts, options) for parts in batch] if whole else sums(batch, rank)


def _rank(parts: Sequence[Part], options: Options) -> tuple[int, bool]:
    """The rank of the result, and whether it is the whole of a single part, which needs no decomposition."""
    rank = options.rank or max(part.factors.rank for part in parts)
    return rank, len(parts) == 1 and rank >= parts[0].factors.rank


METHOD = Method(
    name="svd",
    summary="Add the changes and keep the strongest directions: the nearest matrix of a low rank to the weighted sum.",
    lossless=False,
    options=(
        replace(RANK, help="Rank of the result, a count; the largest of the adapters' ranks without it."),
    ),
    rule=_combine,
    batched=_batched,
    laws=("identity", "order-free", "linear", "homogeneous", "sum"),
)
