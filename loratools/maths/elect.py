"""Merging tensors element by element: a sign is elected, and those that agree with it are averaged.

Tensors are taken one at a time; what is kept between two of them are a few sums of their shape, so that memory does not
grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import torch

MAJORITIES = ("total", "frequency")

# Numbers that cancel do so to rounding only, whose sign must elect nothing.
_CANCELLED = 2.0**-40


def elected_mean(
    pieces: Iterable[torch.Tensor], majority: str = "total", shares: Iterable[float] | None = None
) -> torch.Tensor:
    """Per element the weighted mean of the values that have the elected sign; 0 where none is elected.

    Zeros neither vote nor count. No sign is elected where the votes for both are equal: a sum less than 2⁻⁴⁰ of the
    sum of the magnitudes is 0.

    Args:
        pieces: At least one, all of one shape, floating-point.
        majority: Whose sign is elected: "total", that of the sum of the values; "frequency", that of more of them.
        shares: The weight of each piece in the mean, at least 0, the same number as pieces; default 1 each. They take
            no part in the election.
    """
    sums: list[torch.Tensor] = []
    for piece, share in zip(pieces, repeat(1.0) if shares is None else shares, strict=shares is not None):
        if not sums:
            sums = [torch.zeros_like(piece) for _ in range(6)]
        lean, spread, above, below, aboves, belows = sums
        vote = piece.sign() if majority == "frequency" else piece
        lean += vote
        spread += vote.abs()
        above += share * piece.clamp(min=0.0)
        below += share * piece.clamp(max=0.0)
        aboves += share * (piece > 0).to(piece.dtype)
        belows += share * (piece < 0).to(piece.dtype)
    lean, spread, above, below, aboves, belows = sums
    limit = _CANCELLED * spread
    # Shares that vanish against the others leave nothing to divide: the mean of nothing is 0.
    tiny = torch.finfo(lean.dtype).tiny
    down = torch.where(lean < -limit, below / belows.clamp(min=tiny), 0.0)
    return torch.where(lean > limit, above / aboves.clamp(min=tiny), down)
