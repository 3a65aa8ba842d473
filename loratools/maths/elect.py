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
    voters = _Sides()
    shared = voters if shares is None else _Sides()
    for piece, share in zip(pieces, repeat(1.0) if shares is None else shares, strict=shares is not None):
        voters.add(piece)
        if shared is not voters:
            shared.add(piece, share)
    lean, spread = voters.lean(majority)
    limit = _CANCELLED * spread
    below = torch.where(lean < -limit, shared.below_mean(), 0.0)
    return torch.where(lean > limit, shared.above_mean(), below)


class _Sides:
    """Sums of the positive and of the negative values, and of how many there are, each times a share."""

    def __init__(self) -> None:
        self._sums: tuple[torch.Tensor, ...] = ()

    def add(self, piece: torch.Tensor, share: float = 1.0) -> None:
        """Count another tensor in, with whole-tensor operations that need no mask and no conversion."""
        above, below = piece.clamp(min=0.0), piece.clamp(max=0.0)
        terms = above, below, above.sign(), below.sign()
        if not self._sums:
            self._sums = tuple([torch.zeros_like(piece) for _ in terms])
        for total, term in zip(self._sums, terms, strict=True):
            total.add_(term, alpha=share)

    def lean(self, majority: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the votes, and of their magnitudes."""
        above, below = self._sums[2:] if majority == "frequency" else self._sums[:2]
        return above + below, above - below

    def above_mean(self) -> torch.Tensor:
        """Of the positive values."""
        return _ratio(self._sums[0], self._sums[2])

    def below_mean(self) -> torch.Tensor:
        """Of the negative values."""
        return _ratio(self._sums[1], -self._sums[3])


def _ratio(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    # Shares that vanish against the others leave nothing to divide: the mean of nothing is 0.
    return total / count.clamp(min=torch.finfo(total.dtype).tiny)
