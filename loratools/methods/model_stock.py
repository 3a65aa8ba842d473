"""Scale the mean of the changes by how much they agree, down to nothing where they do not.

    τᵢ = wᵢ·ΔWᵢ;   ΔW = t · (1/T)·Σ τᵢ;   t = T·cos θ / (1 + (T − 1)·cos θ);   cos θ = mean over i < j of cos∠(τᵢ, τⱼ)

Jang, Yun, Han: "Model Stock: all we need is just a few fine-tuned models", arXiv 2403.19522. It takes fine-tuned models
for points around a centre in the same distance and at the same angle from each other; t·mean is the point nearest to
that centre on the way from the base to their mean. A LoRA's base is ΔW = 0.

Differences from the paper, which merges models that were fine-tuned for the same task:
- A negative cos θ counts as 0, which is the base: the formula would turn the mean round.
- The weights multiply the changes before anything else; the paper has none.
- The angle is that between whole matrices, per module, and the mean over all pairs, as mergekit has it; the paper gives
  no formula for more than two.

Adapters of different tasks are nearly orthogonal, and little of them is left: a hundredth of agreement leaves t = 0.02
of the mean of two. T counts the adapters of weight other than 0 that change the weight; one of them whose change is
zero has the cosine 0 with every other.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.means import gram_of, model_stock, weighted_sum
from loratools.methods._base import RANK, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    factors, multipliers = [part.factors for part in parts], [part.multiplier for part in parts]
    shares = model_stock(gram_of(factors, multipliers)) if len(parts) > 1 else [1.0]
    coefficients = [float(share) * by for share, by in zip(shares, multipliers, strict=True)]
    return Outcome(*weighted_sum(factors, coefficients, options.rank))


METHOD = Method(
    name="model-stock",
    summary="Scale the mean of the changes by how much they agree, down to nothing where they do not.",
    lossless=True,
    options=(RANK,),
    rule=_combine,
    laws=("identity", "order-free", "homogeneous"),
)
