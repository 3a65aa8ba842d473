"""What the methods that work on every element of ΔW share: tiles thinned, joined, and compressed without being held.

ΔW = λ · join over i of wᵢ · thin(ΔWᵢ). Every part's rows are computed in tiles and thinned; one tile of all parts is
joined into one of the result, which ``compress_operator`` reduces to factors. A result that is masked element by
element has full rank, so that some of its energy is lost at any lower one; how much is retained is reported. Memory is
that of a few tiles, and of one full matrix where ``max_tile_bytes`` allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce

import torch

from loratools.errors import NonFiniteError
from loratools.maths.draws import key_of
from loratools.maths.elect import MAJORITIES, elected_mean
from loratools.maths.lowrank import COMPUTE, Factors
from loratools.maths.randomized import compress_operator
from loratools.maths.sparsify import band_cut, magnitude_cut
from loratools.maths.thinning import thinned, thinned_by_rank
from loratools.maths.tiles import Sweep, Tile, grouped, held, product, tile_height
from loratools.methods._base import DENSITY, SEED, Option, Options, Outcome, Part

Thin = Callable[[int, torch.Tensor], torch.Tensor]
"""From the index of a tile's first row and the tile of ΔW, (height, in) float64, what is left of it."""

Thinner = Callable[[Part, Options], Thin]
"""Finds what a part's tiles are thinned by."""

Join = Callable[[Iterator[torch.Tensor]], torch.Tensor]
"""From the tiles of all parts, one after the other, a tile of the result; it takes every one of them."""

RANDOM_DENSITY = replace(DENSITY, help="Fraction of each ΔW's elements kept, at random.")
MASK_SEED = replace(SEED, help="Seed of the random masks and of the randomised compression.")
EPSILON = Option(
    "epsilon",
    "epsilon",
    0.1,
    "How far the probabilities of being kept lie apart within a row, from its smallest element to its largest.",
    "a fraction in [0, 1]",
    lambda value: 0.0 <= value <= 1.0,
)
GAMMA = Option(
    "gamma",
    "gamma",
    0.01,
    "Fraction of each ΔW's elements that is removed at the top, the largest by magnitude.",
    "a fraction in [0, 1)",
    lambda value: 0.0 <= value < 1.0,
)
MAJORITY = Option(
    "majority",
    "majority",
    "total",
    'How a sign is elected: "total" by the sum of the values, "frequency" by their number.',
    " or ".join(MAJORITIES),
    lambda value: value in MAJORITIES,
)


def merged(parts: Sequence[Part], options: Options, thin: Thinner, join: Join) -> Outcome:
    """The result of a method that thins each change by itself and then joins them element by element.

    Args:
        parts: At least one, all of one shape (out, in).
        options: Checked.
        thin: What a part's tiles are thinned by, found once.
        join: What makes one tile out of the weighted, thinned ones.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
    """
    check_finite(parts)
    return compressed(_joined(parts, options, thin, join), parts, options)


def merged_whole(
    parts: Sequence[Factors], like: Sequence[Part], options: Options, thin: Thinner, join: Join
) -> torch.Tensor:
    """The same for products in a small common space, which hold the weights already, as one matrix (rows, columns).

    Args:
        parts: At least one, all of one shape.
        like: What each of them was made of.
        options: Checked.
        thin: As in :func:`merged`.
        join: As in :func:`merged`.
    """
    small = [Part(part, source=origin.source) for part, origin in zip(parts, like, strict=True)]
    return torch.cat([tile for _, tile in _joined(small, options, thin, join)()])


def _joined(parts: Sequence[Part], options: Options, thin: Thinner, join: Join) -> Sweep:
    """The rows of the result."""
    rows = weighted(parts, [thin(part, options) for part in parts])

    def sweep() -> Iterator[Tile]:
        for start, pieces in rows():
            yield start, options.lam * join(pieces)

    return sweep


def weighted(
    parts: Sequence[Part], thins: Sequence[Thin]
) -> Callable[[], Iterator[tuple[int, Iterator[torch.Tensor]]]]:
    """All parts by row tiles: the index of the first row, and one part's tile at a time, thinned and weighted.

    The tiles of some rows must all be taken before those of the next. Every call of the result gives the same values.
    """
    shape = parts[0].factors.shape
    sweeps = [product(part.factors) for part in parts]

    def rows() -> Iterator[tuple[int, Iterator[torch.Tensor]]]:
        streams = [sweep() for sweep in sweeps]
        for start in range(0, shape[0], tile_height(shape)):
            yield start, _pieces(start, streams, thins, parts)

    return rows


def _pieces(
    start: int, streams: Sequence[Iterator[Tile]], thins: Sequence[Thin], parts: Sequence[Part]
) -> Iterator[torch.Tensor]:
    for stream, thin, part in zip(streams, thins, parts, strict=True):
        tile = thin(start, next(stream)[1])
        yield tile if part.multiplier == 1.0 else tile * part.multiplier


def compressed(sweep: Sweep, parts: Sequence[Part], options: Options) -> Outcome:
    """A merged matrix as factors of the rank asked for, by default the sum of the parts' ranks."""
    rank = options.rank or sum(part.factors.rank for part in parts)
    shape = parts[0].factors.shape
    kept = held(grouped(sweep), shape, options.max_tile_bytes)
    found = compress_operator(kept, shape, rank, seed=options.seed)
    return Outcome(found.factors, found.energy, found.square)


def check_finite(parts: Sequence[Part]) -> None:
    """Refuse factors that hold NaN or Inf, which a mask might hide.

    Raises:
        NonFiniteError: One does.
    """
    for part in parts:
        sums = part.factors.up.sum(dtype=COMPUTE) + part.factors.down.sum(dtype=COMPUTE)
        if not bool(torch.isfinite(sums)):
            raise NonFiniteError(
                f"a factor of adapter {part.source + 1} holds NaN or Inf",
                expected="Finite factors were expected",
                todo="Leave that adapter out, or repair it",
            )


def total(pieces: Iterator[torch.Tensor]) -> torch.Tensor:
    """Joins by the sum."""
    return reduce(torch.add, pieces)


def elected(options: Options) -> Join:
    """Joins by the mean of the values whose sign is the elected one, 0 where none is."""
    return lambda pieces: elected_mean(pieces, options.majority)


def trimmed(part: Part, options: Options) -> Thin:
    """Keeps the share ``density`` of ΔW's elements, the largest by magnitude, exactly."""
    return magnitude_cut(_whole(part, options), _numel(part), options.density).trimmed


def banded(part: Part, options: Options) -> Thin:
    """Keeps the share ``density`` of ΔW's elements, the largest but for the share ``gamma`` of the very largest."""
    return band_cut(_whole(part, options), _numel(part), options.density, options.gamma).trimmed


def dropped(part: Part, options: Options) -> Thin:
    """Keeps each element with the probability ``density``, and divides it by that."""
    key = key_of(options.seed, options.key, part.source)
    return lambda start, tile: thinned(start, tile, options.density, key)


def sampled(part: Part, options: Options) -> Thin:
    """Keeps each element with a probability by its rank in its row, and divides it by that."""
    key = key_of(options.seed, options.key, part.source)
    return lambda start, tile: thinned_by_rank(start, tile, options.density, options.epsilon, key)


def _whole(part: Part, options: Options) -> Sweep:
    # A factor does not change which magnitudes are the largest: the cut is taken of up @ down itself.
    return held(product(part.factors), part.factors.shape, options.max_tile_bytes)


def _numel(part: Part) -> int:
    return part.factors.shape[0] * part.factors.shape[1]
