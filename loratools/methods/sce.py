"""Keep the elements that vary most between the changes, weight changes by their energy there, and erase minority signs.

    select     S = the top ``density`` of elements by the variance of {τᵢ} over i, τᵢ = wᵢ·ΔWᵢ;  τ̂ᵢ = τᵢ on S, else 0
    calculate  ηᵢ = ‖τ̂ᵢ‖_F² / Σⱼ ‖τ̂ⱼ‖_F²
    erase      γ = sgn(Σᵢ τ̂ᵢ);  ΔW = λ · Σ { ηᵢ·τ̂ᵢ : sgn(τ̂ᵢ) = γ } / Σ { ηᵢ : sgn(τ̂ᵢ) = γ } per element, 0 where γ = 0

Wan and others: "FuseChat: knowledge fusion of chat models", arXiv 2408.07990. Dividing by the coefficients of those
that agree is taken from its implementation in mergekit.

Differences from that implementation:
- Exactly density · numel elements (rounded half up, at least one) are selected, ties broken by position; there a share
  of those whose variance is not 0.
- Where no element varies (one adapter, or equal ones) there is nothing to select by, and all are kept: the result is
  that adapter's change. There it is 0.
- Where Σ τ̂ᵢ is 0 up to rounding no sign is elected; there the positive one.
- The weights multiply the changes before anything else; there are none there. A weight counts once in τᵢ and squared
  in ηᵢ.

The result has full rank. It is computed by row tiles, held only while small, and recompressed from tiles to ``rank``
(by default Σ rankᵢ); the energy reported is what that rank retains of it. Selecting takes one tile of every
adapter at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce

import torch

from loratools.maths.elect import elected_mean
from loratools.maths.sparsify import Cut, magnitude_cut
from loratools.maths.tiles import Sweep, Tile, held
from loratools.methods._base import DENSITY, LAMBDA, RANK, SEED, Method, Options, Outcome, Part
from loratools.methods._elementwise import check_finite, compressed, weighted

_Rows = Callable[[], Iterator[tuple[int, list[torch.Tensor]]]]
"""Goes through all rows once: the index of the first of some, and a tile of every adapter."""

# Equal changes in unequal factors differ by rounding: that of ‖·‖² relative to their own.
_EQUAL = 2.0**-80


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    check_finite(parts)
    rows = _selected(_rows(parts), parts[0].factors.shape, options)
    shares = _shares(rows)

    def sweep() -> Iterator[Tile]:
        for start, pieces in rows():
            yield start, options.lam * elected_mean(pieces, shares=shares)

    return compressed(sweep, parts, options)


def _rows(parts: Sequence[Part]) -> _Rows:
    one_by_one = weighted(parts, [lambda _start, tile: tile] * len(parts))
    return lambda: ((start, list(pieces)) for start, pieces in one_by_one())


def _selected(rows: _Rows, shape: tuple[int, int], options: Options) -> _Rows:
    """The same rows, with 0 wherever the adapters vary less than at the selected elements."""
    cut = _variance_cut(rows, shape, options) if options.density < 1.0 else None
    if cut is None:
        return rows
    chosen = cut

    def sweep() -> Iterator[tuple[int, list[torch.Tensor]]]:
        for start, pieces in rows():
            # As numbers: a product is several times quicker than a choice by a mask.
            kept = chosen.kept(start, _spread(pieces)).to(pieces[0].dtype)
            yield start, [piece * kept for piece in pieces]

    return sweep


def _variance_cut(rows: _Rows, shape: tuple[int, int], options: Options) -> Cut | None:
    """Where to cut variances, or None where nothing varies."""
    spreads = held(_spreads(rows), shape, options.max_tile_bytes)
    varying = sum(float(tile.sum()) for _, tile in spreads())
    whole = sum(float(piece.square().sum()) for _, pieces in rows() for piece in pieces)
    if varying <= _EQUAL * whole:
        return None
    return magnitude_cut(spreads, shape[0] * shape[1], options.density)


def _spreads(rows: _Rows) -> Sweep:
    return lambda: ((start, _spread(pieces)) for start, pieces in rows())


def _spread(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The variance over the adapters times their number, which orders elements alike."""
    mean = reduce(torch.add, pieces) / len(pieces)
    return reduce(torch.add, [(piece - mean).square() for piece in pieces])


def _shares(rows: _Rows) -> list[float]:
    """ηᵢ up to a common factor: the largest is 1, or all are where every selected element is 0."""
    squares: list[float] = []
    for _, pieces in rows():
        found = [float(piece.square().sum()) for piece in pieces]
        squares = [one + other for one, other in zip(squares or [0.0] * len(found), found, strict=True)]
    largest = max(squares)
    return [square / largest for square in squares] if largest else [1.0] * len(squares)


METHOD = Method(
    name="sce",
    summary="Keep the elements that vary most between the changes, weight changes by their energy there, and erase "
    "minority signs.",
    lossless=False,
    options=(
        RANK,
        replace(DENSITY, help="Fraction of elements kept, those that vary most between the adapters."),
        LAMBDA,
        SEED,
    ),
    rule=_combine,
    laws=("identity", "order-free", "homogeneous"),
)
