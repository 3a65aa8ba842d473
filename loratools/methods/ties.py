"""Trim each change, elect a sign per element, and average the changes that agree with it.

    τᵢ = wᵢ·ΔWᵢ;  τ̂ᵢ = τᵢ where |τᵢ| is among the top ``density`` of its elements, else 0
    γ  = sgn(Σᵢ τ̂ᵢ);  ΔW = λ · mean of { τ̂ᵢ : sgn(τ̂ᵢ) = γ } per element, 0 where γ = 0

Yadav and others: "TIES-merging: resolving interference when merging models", arXiv 2306.01708.

Differences from the reference implementation, which merges whole models flattened to one vector each:
- Trimming is per module, so that every weight keeps its share; there it is over the whole checkpoint, where
  modules of small magnitude may vanish.
- Weights enter with the task vectors, τᵢ = wᵢ·ΔWᵢ, so that one adapter with weight w gives w·trim(ΔW) and a
  negative weight negates; the paper has no weights.
- Where Σ τ̂ᵢ is exactly 0 no sign is elected, as in the paper's formula; there the majority sign of the whole
  model is taken.
- Exactly density · numel elements (rounded half up, at least one) are kept, ties broken by position.
PEFT's "ties" trims and elects on the factors, whose products are not the trimmed and elected ΔW.

The result has full rank. It is computed by row tiles, held only while small, and recompressed from tiles to
``rank`` (by default Σ rankᵢ); the energy reported is what that rank retains of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from loratools.maths.randomized import compress_operator
from loratools.maths.sparsify import Cut, magnitude_cut
from loratools.maths.tiles import Sweep, Tile, held, product
from loratools.methods._base import DENSITY, LAMBDA, RANK, SEED, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    rank = options.rank or sum(part.factors.rank for part in parts)
    shape = parts[0].factors.shape
    merged = held(_merged(parts, options), shape, options.max_tile_bytes)
    compressed = compress_operator(merged, shape, rank, seed=options.seed)
    return Outcome(compressed.factors, compressed.energy, compressed.square)


def _merged(parts: Sequence[Part], options: Options) -> Sweep:
    """The merged matrix by row tiles; the cuts are found once, before the first sweep."""
    shape = parts[0].factors.shape
    sweeps = [product(part.factors) for part in parts]
    # A positive factor does not change which magnitudes are the largest: the cut is taken of ΔW itself.
    cuts = [
        magnitude_cut(held(sweep, shape, options.max_tile_bytes), shape[0] * shape[1], options.density)
        for sweep in sweeps
    ]
    weights = [part.multiplier for part in parts]

    def sweep() -> Iterator[Tile]:
        for tiles in zip(*(sweep() for sweep in sweeps), strict=True):
            yield tiles[0][0], options.lam * _elected_mean(tiles, cuts, weights)

    return sweep


def _elected_mean(tiles: Sequence[Tile], cuts: Sequence[Cut], weights: Sequence[float]) -> torch.Tensor:
    """One tile of the merge: per element the mean of the trimmed values that have the sign of their sum."""
    like = tiles[0][1]
    total, positive, negative = (torch.zeros_like(like) for _ in range(3))
    ups, downs = (torch.zeros_like(like, dtype=torch.int32) for _ in range(2))
    for (start, tile), cut, weight in zip(tiles, cuts, weights, strict=True):
        trimmed = torch.where(cut.kept(start, tile), tile * weight, 0.0)
        total += trimmed
        positive += trimmed.clamp(min=0.0)
        negative += trimmed.clamp(max=0.0)
        ups += trimmed > 0
        downs += trimmed < 0
    zero = torch.zeros_like(total)
    return torch.where(total > 0, positive / ups, torch.where(total < 0, negative / downs, zero))


METHOD = Method(
    name="ties",
    summary="Trim each change, elect a sign per element, and average the changes that agree with it.",
    lossless=False,
    options=(RANK, DENSITY, LAMBDA, SEED),
    rule=_combine,
    laws=("order-free", "homogeneous"),
)
