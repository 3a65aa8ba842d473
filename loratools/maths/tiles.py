"""A matrix as a sequence of row tiles that can be computed again, for work that must not hold it whole.

The product of a few rows need not agree bit for bit with those rows of the whole product: a matrix library
chooses its order of summation by shape. Everything here is therefore cut at boundaries that follow from the
matrix's shape alone. Every sweep multiplies the same blocks, so an element has the same bits in each of them
(on one machine with one number of threads), and no memory limit changes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from loratools.maths.lowrank import COMPUTE, Factors

Tile = tuple[int, torch.Tensor]
"""The index of its first row, and the rows (height, in)."""

Sweep = Callable[[], Iterator[Tile]]
"""Goes through all rows once, in order; every call gives the same values."""

# What element by element work holds at a time, a tile and a few sums of its shape, stays in a processor's own cache.
_TILE_ELEMENTS = 1 << 15
# Products with a few hundred vectors want more rows at a time.
_GROUP_ELEMENTS = 1 << 18


def tile_height(shape: tuple[int, int]) -> int:
    """Rows per tile of a matrix of this shape: about 256 KiB of float64, at least one row."""
    return max(1, _TILE_ELEMENTS // max(1, shape[1]))


def product(factors: Factors) -> Sweep:
    """The rows of up @ down in float64, computed anew in every sweep."""
    up, down = factors.up.to(COMPUTE), factors.down.to(COMPUTE)
    height = tile_height(factors.shape)

    def sweep() -> Iterator[Tile]:
        for start in range(0, up.shape[0], height):
            yield start, up[start : start + height] @ down

    return sweep


def grouped(sweep: Sweep) -> Sweep:
    """The same rows in tiles of about 2 MiB of float64, each of whole tiles of the sweep's own."""

    def sweep_groups() -> Iterator[Tile]:
        rows: list[torch.Tensor] = []
        begun = count = 0
        for start, tile in sweep():
            begun = begun if rows else start
            rows.append(tile)
            count += tile.numel()
            if count >= _GROUP_ELEMENTS:
                yield begun, torch.cat(rows)
                rows, count = [], 0
        if rows:
            yield begun, torch.cat(rows)

    return sweep_groups


def held(sweep: Sweep, shape: tuple[int, int], limit: int) -> Sweep:
    """The same tiles, computed once and kept where the matrix is no larger than ``limit`` bytes."""
    if shape[0] * shape[1] * COMPUTE.itemsize > limit:
        return sweep
    tiles = list(sweep())
    return lambda: iter(tiles)
