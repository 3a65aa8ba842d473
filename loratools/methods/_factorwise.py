"""What the methods share that treat up and down as matrices of their own, which only compatibility asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch

from loratools.errors import ShapeError
from loratools.maths.lowrank import Factors
from loratools.methods._base import Outcome, Part

Join = Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]
"""From one factor of every part, and a float32 weight for each, the merged factor."""


def joined(parts: Sequence[Part], join: Join) -> Outcome:
    """Both factors merged by themselves, the root of every weight's magnitude in each and its sign in down.

    Args:
        parts: At least one, all of one rank; those of half precision are computed with in float32.
        join: What merges one of the factors.

    Raises:
        ShapeError: The ranks differ.
    """
    ranks = [part.factors.rank for part in parts]
    if len(set(ranks)) > 1:
        raise ShapeError(
            f"the adapters change one weight at the ranks {', '.join(map(str, ranks))}",
            expected="One rank was expected: factors of different ranks cannot be added, here as in PEFT",
            todo="Merge by linear or ties, which work on ΔW, or resize the adapters to one rank",
        )
    dtype = reduce(torch.promote_types, [part.factors.up.dtype for part in parts], torch.float32)
    wide = [part.factors.to(dtype) for part in parts]
    roots = [math.sqrt(abs(part.multiplier)) for part in parts]
    signed = [math.copysign(root, part.multiplier) for root, part in zip(roots, parts, strict=True)]
    device = wide[0].up.device
    # A float32 tensor, as in PEFT: a Python number would not be rounded to it.
    up = join([each.up for each in wide], torch.tensor(roots, dtype=torch.float32, device=device))
    down = join([each.down for each in wide], torch.tensor(signed, dtype=torch.float32, device=device))
    return Outcome(Factors(up, down))


def weighted_sum(factors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Σ weightᵢ · factorᵢ."""
    return stacked(torch.stack(list(factors)), weights).sum(dim=0)


def stacked(factors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each of the matrices (parts, rows, columns) times its weight."""
    return factors * weights[:, None, None]
