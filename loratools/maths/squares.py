"""The sum of the squares of many numbers."""

from __future__ import annotations

import torch

# Numbers that are converted at a time: what stays in a processor's own cache.
_PIECE = 1 << 16


def square_of(values: torch.Tensor) -> float:
    """Σ of squares, in float64; NaN or infinite where a value is.

    torch's own sum in float64 is several times slower on a CPU: it converts number by number.

    Args:
        values: Of any shape and floating dtype.
    """
    if values.device.type != "cpu" or not values.is_contiguous():
        return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    total = 0.0
    for piece in torch.split(values.reshape(-1), _PIECE):
        wide = piece.to(torch.float64)
        total += float(torch.dot(wide, wide))
    return total
