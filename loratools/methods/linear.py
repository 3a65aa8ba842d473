"""Add the changes: the weighted sum of every adapter's ΔW, exactly.

    ΔW = Σᵢ wᵢ·ΔWᵢ

Ilharco and others: "Editing models with task arithmetic", arXiv 2212.04089.

The sum is taken of the products, by stacking the factors. PEFT's "linear" adds the factors themselves, and
(Σ sqrt(wᵢ)·Bᵢ)(Σ sqrt(wᵢ)·Aᵢ) also holds every cross term BᵢAⱼ, which no adapter contains. Without a rank the
result has the numerical rank of the sum, at most Σ rankᵢ; with one it is the nearest matrix of that rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.lowrank import COMPUTE, Factors, compress, stack
from loratools.methods._base import RANK, Method, Options, Outcome, Part
from loratools.methods._sums import sums


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    if len(parts) == 1 and options.rank is None:
        return Outcome(_weighted(parts[0]))
    stacked = stack([part.factors for part in parts], [part.multiplier for part in parts])
    compressed = compress(stacked, options.rank)
    return Outcome(compressed.factors, compressed.energy, compressed.square)


def _batched(batch: Sequence[Sequence[Part]], options: Options) -> list[Outcome]:
    if len(batch[0]) == 1 and options.rank is None:
        return [_combine(parts, options) for parts in batch]
    return sums(batch, options.rank)


def _weighted(part: Part) -> Factors:
    """The factors as they are, the weight in up; at weight 1 the very same tensors."""
    if part.multiplier == 1.0:
        return part.factors
    wide = part.factors.to(COMPUTE)
    return Factors(wide.up * part.multiplier, wide.down)


METHOD = Method(
    name="linear",
    summary="Add the changes: the weighted sum of every adapter's ΔW, exactly.",
    lossless=True,
    options=(RANK,),
    rule=_combine,
    batched=_batched,
    laws=("identity", "order-free", "linear", "homogeneous", "sum"),
)
