"""Element-wise merging of small matrices, one after the other: trimming, signs by election, random thinning.

For matrices in a common small basis. What is kept between two of them are a few sums of their shape, so that memory
does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loratools.maths.draws import uniform
from loratools.maths.sparsify import magnitude_cut

# Values in a common basis have been rotated into it: what cancelled before does so to rounding only.
_CANCELLED = 2.0**-40


def elected_mean(matrices: Iterable[torch.Tensor], density: float) -> torch.Tensor:
    """Per element the mean of the trimmed values that have the sign of their sum; 0 where that sum is 0.

    A sum counts as 0 where it is less than 2⁻⁴⁰ of the sum of the magnitudes.

    Args:
        matrices: At least one, all of one shape, float64.
        density: The fraction of each matrix's elements kept, the largest by magnitude, in (0, 1]; rounded half up to
            a count of at least one, ties broken by position.

    Raises:
        NonFiniteError: A matrix holds NaN or Inf.
    """
    sums: list[torch.Tensor] = []
    for matrix in matrices:
        trimmed = _trimmed(matrix, density)
        if not sums:
            sums = [torch.zeros_like(trimmed) for _ in range(4)]
        positive, negative, ups, downs = sums
        positive += trimmed.clamp(min=0.0)
        negative += trimmed.clamp(max=0.0)
        ups += trimmed > 0
        downs += trimmed < 0
    total, limit = positive + negative, _CANCELLED * (positive - negative)
    zero = torch.zeros_like(total)
    return torch.where(total > limit, positive / ups, torch.where(total < -limit, negative / downs, zero))


def thinned(matrix: torch.Tensor, density: float, key: int) -> torch.Tensor:
    """Every element kept with the probability ``density`` and then divided by it, else 0.

    Args:
        matrix: (rows, columns) float64.
        density: In (0, 1].
        key: Of the draws, from ``draws.key_of``; an element's fate depends on it and on the element's place.
    """
    kept = uniform(key, 0, (matrix.shape[0], matrix.shape[1]), matrix.device) < density
    return torch.where(kept, matrix / density, 0.0)


def _trimmed(matrix: torch.Tensor, density: float) -> torch.Tensor:
    cut = magnitude_cut(lambda: iter([(0, matrix)]), matrix.numel(), density)
    return torch.where(cut.kept(0, matrix), matrix, 0.0)
