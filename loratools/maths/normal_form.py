"""Many small products up · down at once, in one form: scale folded, ranks padded, and what tells two of them apart.

A sketch of ΔW is z_pᵀ·ΔW·x_p for a few pairs of Gaussian vectors, drawn anew from the sizes of ΔW alone: the numbers
depend on ΔW and not on its factors, so that the same adapter with its factors rotated, its scale folded or its rank
padded has the same sketch but for rounding. With factors of rank r it costs r·(out + in) operations for each pair.
All modules of one shape are taken together, (n, out, rank) and (n, rank, in): the matrices are too small to be worth a
call each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from loratools.maths.lowrank import COMPUTE

PAIRS = 8
"""Numbers of a sketch of one module."""

_WORDS = 2**20


class Stacked(NamedTuple):
    """Products of one shape.

    Attributes:
        up: (n, out, rank).
        down: (n, rank, in), of the same dtype.
    """

    up: torch.Tensor
    down: torch.Tensor


def folded(given: Stacked, scales: Sequence[float], dtype: torch.dtype) -> Stacked:
    """The same products times a scale each, in a store dtype.

    Half of a scale's power of two goes into each factor, which rounds nothing short of the dtype's limits; what is left
    goes into ``up``. Computed in float64 and rounded once; factors of scale 1 in that dtype stay as they are.

    Args:
        given: The factors; they need not be of one dtype.
        scales: One for each product.
        dtype: Of the result.
    """
    if all(scale == 1.0 for scale in scales) and given.up.dtype == given.down.dtype == dtype:
        return given
    # Most adapters have one scale, or few.
    halves = {scale: int(round(math.log2(abs(scale))) / 2) if scale else 0 for scale in set(scales)}
    left = torch.tensor([scale / 2.0 ** halves[scale] for scale in scales], dtype=COMPUTE)
    right = torch.tensor([2.0 ** halves[scale] for scale in scales], dtype=COMPUTE)
    return Stacked(
        (given.up.to(COMPUTE) * left[:, None, None]).to(dtype),
        (given.down.to(COMPUTE) * right[:, None, None]).to(dtype),
    )


def padded(given: Stacked, rank: int) -> Stacked:
    """The same products at a rank that is no lower: with columns and rows of zeros, which change nothing.

    Args:
        given: The factors.
        rank: A count.
    """
    count, out, own = given.up.shape
    if own == rank:
        return given
    up = given.up.new_zeros(count, out, rank)
    down = given.down.new_zeros(count, rank, given.down.shape[2])
    up[:, :, :own], down[:, :own] = given.up, given.down
    return Stacked(up, down)


def sketches(given: Stacked) -> torch.Tensor:
    """Numbers that the products determine, whatever their factors.

    Returns:
        (n, PAIRS) float64; NaN or infinite where a factor holds such a value.
    """
    out, width = given.up.shape[1], given.down.shape[2]
    # Apart, so that a square ΔW and its transpose differ.
    left = given.up.to(COMPUTE).transpose(1, 2) @ probes(2 * out, out)
    right = given.down.to(COMPUTE) @ probes(2 * width + 1, width)
    return (left * right).sum(1)


@lru_cache(maxsize=32)
def probes(seed: int, length: int) -> torch.Tensor:
    """Gaussian vectors (length, PAIRS) in float64, the same in every run; they must not be changed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, PAIRS, generator=generator, dtype=COMPUTE)


def differences(one: Stacked, other: Stacked) -> tuple[torch.Tensor, torch.Tensor]:
    """‖ΔW − ΔW'‖_F and the larger of both norms, from the factors, without cancellation.

    The factors side by side, [up, up'] and [down; −down'], are made triangular, and what is left is the norm of a small
    core, exact to a few units in the last place of the products.

    Args:
        one: (n, out, rank) and (n, rank, in).
        other: As many of the same shapes; the rank may be another.

    Returns:
        Differences and norms, (n,) float64 each.
    """
    rank = one.up.shape[2]
    ups = torch.cat([one.up.to(COMPUTE), other.up.to(COMPUTE)], dim=2)
    downs = torch.cat([one.down.to(COMPUTE), -other.down.to(COMPUTE)], dim=1).transpose(1, 2)
    left, right = torch.linalg.qr(ups, mode="r").R, torch.linalg.qr(downs, mode="r").R
    away = torch.linalg.matrix_norm(left @ right.transpose(1, 2))
    own = torch.linalg.matrix_norm(left[:, :, :rank] @ right[:, :, :rank].transpose(1, 2))
    others = torch.linalg.matrix_norm(left[:, :, rank:] @ right[:, :, rank:].transpose(1, 2))
    return away, torch.maximum(own, others)


def projected(sketch: torch.Tensor, count: int) -> torch.Tensor:
    """A few numbers of a long sketch, by random directions that its length alone decides.

    Args:
        sketch: (m,) float64, of all modules of an adapter.
        count: How many numbers.

    Returns:
        (count,) float64; the norm is that of the sketch but for some 1 / √count of it.
    """
    found = torch.zeros(count, dtype=COMPUTE)
    step = max(1, _WORDS // count)
    for start in range(0, len(sketch), step):
        part = sketch[start : start + step]
        found += _directions(start, count, len(part)) @ part
    return found


@lru_cache(maxsize=4)
def _directions(seed: int, count: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, length, generator=generator, dtype=COMPUTE) / math.sqrt(count)
