"""The norms of a base weight that directions of an adapter are scored against."""

from __future__ import annotations

import math

import torch

from loratools.maths.rank import Rule
from loratools.maths.squares import square_of
from loratools.maths.svd import decompose

_LEADING = Rule("rank", 1)


def norm_of(weight: torch.Tensor, norm: str) -> float:
    """A norm of a weight with its kernel flattened.

    Args:
        weight: (out, in[, kh, kw]), of any floating dtype.
        norm: "frobenius", sqrt(ΣΣW²), or "spectral", the largest singular value, to a thousandth at least.
    """
    matrix = weight.detach().flatten(1).to(torch.float32)
    if norm == "frobenius":
        return math.sqrt(square_of(matrix))
    sigma = decompose(matrix, _LEADING).sigma
    return float(sigma[0]) if sigma.numel() else 0.0
