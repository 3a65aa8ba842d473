"""Take the mean of the changes and add the strongest directions in which each one differs from it.

    τᵢ = wᵢ·ΔWᵢ;  τ̄ = (1/T)·Σᵢ τᵢ;  ΔW = τ̄ + λ·Σᵢ trunc_k(τᵢ − τ̄),   trunc_k the best approximation of rank k

Choi and others: "Revisiting weight averaging for model merging" (CART), arXiv 2412.12153.

Differences from the paper, which is for fully fine-tuned weights:
- k is ``part-rank``, or 8 % (rounded up) of the d = min(Σ rankᵢ, out, in) directions that the adapters can have
  together. The paper finds about 8 % of the full rank to work well; of min(out, in) that would be all that a LoRA
  has, and as Σᵢ (τᵢ − τ̄) = 0 nothing would be added to the mean. Core space merging (arXiv 2509.17786) takes a
  share of d likewise.
- The weights multiply the changes before anything else, and T counts the adapters of weight other than 0.
- λ is 1 unless given; the paper chooses it by validation.

Everything happens in the space that the adapters span: time (out + in)·d² + T·d³, memory that of the factors and a
few d x d matrices. Where Σ rankᵢ reaches min(out, in) that space is the whole one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from loratools.maths.leading import leading_svd
from loratools.maths.lowrank import Factors, balanced, compress, stack
from loratools.maths.spectra_ops import Reduced, core_size, full_size_note, reduced
from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part

_SHARE = 0.08


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    if len(parts) == 1 and parts[0].multiplier == 1.0 and options.rank is None:
        return Outcome(parts[0].factors)
    factors = [part.factors for part in parts]
    space = reduced(factors, [part.multiplier for part in parts])
    kept = options.part_rank or math.ceil(_SHARE * core_size(space.parts))
    merged = _merged(space, kept, options.lam)
    compressed = compress(merged, options.rank)
    expanded = space.expanded(compressed.factors)
    return Outcome(expanded, compressed.energy, compressed.square, full_size_note(factors))


def _merged(space: Reduced, kept: int, lam: float) -> Factors:
    count = len(space.parts)
    mean = stack(space.parts, [1.0 / count] * count)
    centre = mean.delta()
    differences = [balanced(leading_svd(part.delta() - centre, kept)) for part in space.parts]
    return stack([mean, *differences], [1.0, *[lam] * count])


METHOD = Method(
    name="cart",
    summary="Take the mean of the changes and add the strongest directions in which each one differs from it.",
    lossless=True,
    options=(
        RANK,
        LAMBDA,
        replace(
            RANK,
            name="part-rank",
            field="part_rank",
            help="Rank of what each adapter adds to the mean, a count; 8 % of the directions of all without it.",
        ),
    ),
    rule=_combine,
    laws=("identity", "order-free", "homogeneous"),
)
