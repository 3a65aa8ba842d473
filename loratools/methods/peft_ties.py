"""Trim, elect and average the factors themselves, as PEFT's "ties" does: a compatibility method.

    cᵢ = wᵢ·scaleᵢ;  for x = up with sᵢ = sqrt|cᵢ|, and for x = down with sᵢ = sgn(cᵢ)·sqrt|cᵢ|:
    x̂ᵢ = xᵢ where |xᵢ| is among the top ``density`` of its elements, else 0
    γ  = 1 where Σᵢ x̂ᵢ ≥ 0, else -1;  x = mean of { sᵢ·x̂ᵢ : sgn(x̂ᵢ) = γ } per element;  ΔW = up @ down

Source: PEFT 0.21, ``LoraModel.add_weighted_adapter(combination_type="ties")``. It exists to match an adapter that was
merged so. What is trimmed and elected are factors, whose product is not the trimmed and elected ΔW and depends on how
ΔW is split into factors; and weights take no part in the election. "ties" works on ΔW.

What is as there: the rank is that of the inputs, which must be equal; int(density · numel) elements are kept; weights
are float32; factors of half precision are computed with in float32, as PEFT loads them. What differs:
- The result is stored in the inputs' own dtype; PEFT writes float32, as --dtype float32 does here.
- An adapter of weight 0 is absent; there it votes.
- One adapter by itself is trimmed, too; there it goes through "linear".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loratools.methods._base import DENSITY, Method, Options, Outcome, Part
from loratools.methods._elementwise import MAJORITY
from loratools.methods._factorwise import joined, stacked


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    def join(factors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        kept = torch.stack([_trimmed(factor, options.density) for factor in factors])
        agree = kept.sign() == _elected(kept, options.majority)
        counts = agree.sum(dim=0).clamp(min=1.0)
        return (stacked(kept, weights) * agree).sum(dim=0) / counts

    return joined(parts, join)


def _trimmed(factor: torch.Tensor, density: float) -> torch.Tensor:
    """The int(density · numel) largest elements by magnitude, and 0 elsewhere."""
    if density >= 1.0:
        return factor
    flat = factor.flatten()
    # The same call as there, since which of equal elements it takes is its own affair.
    largest = torch.topk(flat.abs(), int(density * flat.numel())).indices
    mask = torch.zeros_like(flat)
    mask[largest] = 1.0
    return (flat * mask).view_as(factor)


def _elected(kept: torch.Tensor, majority: str) -> torch.Tensor:
    votes = kept.sum(dim=0) if majority == "total" else kept.sign().sum(dim=0)
    return torch.where(votes >= 0, 1, -1)


METHOD = Method(
    name="peft-ties",
    summary="Trim, elect and average the factors themselves, as PEFT's ties does: for compatibility alone.",
    lossless=False,
    options=(DENSITY, MAJORITY),
    rule=_combine,
)
