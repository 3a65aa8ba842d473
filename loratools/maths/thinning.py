"""Random thinning of a matrix that is given as row tiles: an element's fate depends on its place alone.

Every element x is kept with a probability p and becomes x / p, else 0, so that its expectation is x. The draws belong
to places (see ``draws``): tiles, devices, threads and the order of work change nothing.
"""

from __future__ import annotations

import torch

from loratools.maths.draws import uniform
from loratools.maths.sparsify import places_in_rows


def thinned(start: int, tile: torch.Tensor, density: float, key: int) -> torch.Tensor:
    """Every element kept with the same probability.

    Args:
        start: The index of the tile's first row in the whole matrix.
        tile: (rows, columns) float64.
        density: The probability, in (0, 1].
        key: Of the draws, from ``draws.key_of``.
    """
    return torch.where(_drawn(start, tile, key) < density, tile / density, 0.0)


def thinned_by_rank(start: int, tile: torch.Tensor, density: float, epsilon: float, key: int) -> torch.Tensor:
    """Every element kept with a probability that grows by even steps with the rank of its magnitude in its row.

    Args:
        start: The index of the tile's first row in the whole matrix.
        tile: (rows, columns) float64.
        density: The mean of the probabilities of a row, in (0, 1].
        epsilon: How far they lie apart, in [0, 1]; see ``row_probabilities``.
        key: Of the draws, from ``draws.key_of``.
    """
    probability = row_probabilities(tile.shape[1], density, epsilon, tile.device)[places_in_rows(tile)]
    return torch.where(_drawn(start, tile, key) < probability, tile / probability, 0.0)


def row_probabilities(
    count: int, density: float, epsilon: float, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Probabilities of being kept, from the largest of a row to the smallest: (count,) float64 in (0, 1].

    The middles of ``count`` even steps from density + ε/2 down to density − ε/2, whose mean is the density exactly. ε
    is ``epsilon``, or less where the density is nearer than ε/2 to 0 or 1.

    Args:
        count: Elements of a row.
        density: In (0, 1].
        epsilon: In [0, 1].
        device: Where.
    """
    width = min(epsilon, 2.0 * density, 2.0 * (1.0 - density))
    middles = (torch.arange(count, dtype=torch.float64, device=device) + 0.5) / count
    return density + width * (0.5 - middles)


def _drawn(start: int, tile: torch.Tensor, key: int) -> torch.Tensor:
    return uniform(key, start, (tile.shape[0], tile.shape[1]), tile.device)
