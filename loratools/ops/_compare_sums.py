"""What a comparison adds up, target by target, and the relations that come of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from loratools.maths.lowrank import COMPUTE
from loratools.ops._compare_matrix import Details
from loratools.ops._compare_target import TargetFigures
from loratools.ops.compare_results import Matrix, ModulePair, Relation

Angles = tuple[float | None, float | None]
"""The smallest principal angles of column and row spaces, in degrees; None where one is zero."""

# Of a pair: the weight of a mean, four figures under that weight, and the sums of the signs.
_FIGURES = 7


class Sums:
    """Inner products, squared distances and the details of pairs over several targets side by side.

    The inner product over all targets is the sum of theirs, and so is the squared distance; an input that lacks a
    target is 0 there. Memory grows with the square of the number of inputs and not with that of the targets.
    """

    def __init__(self, count: int) -> None:
        """Nothing yet, for this many inputs."""
        self.gram = torch.zeros(count, count, dtype=COMPUTE)
        self.squares = torch.zeros(count, count, dtype=COMPUTE)
        self._details = torch.zeros(count, count, _FIGURES, dtype=COMPUTE)

    def add(self, found: TargetFigures) -> None:
        """Add a target."""
        index = torch.tensor(found.members)
        gram = torch.zeros_like(self.gram)
        gram[index[:, None], index] = found.gram
        norms = gram.diagonal()
        squares = norms[:, None] + norms[None, :]
        squares[index[:, None], index] = found.squares
        self.gram += gram
        self.squares += squares.fill_diagonal_(0.0)
        if found.details is not None:
            self._details[index[:, None], index] += _weighted(found.details, found.gram)

    def relation(self, first: int, second: int) -> Relation:
        """How two inputs relate; ``first`` is below ``second``."""
        cosine, ratio, distance = _plain(
            float(self.gram[first, first]),
            float(self.gram[second, second]),
            float(self.gram[first, second]),
            float(self.squares[first, second]),
        )
        weight, *weighted, opposite, total = self._details[first, second].tolist()
        columns, rows, column_chance, row_chance = (
            min(1.0, each / weight) if weight else None for each in weighted
        )
        return Relation(
            cosine,
            ratio,
            distance,
            columns,
            rows,
            column_chance,
            row_chance,
            sign_conflict=opposite / total if total else None,
        )

    def norms(self) -> list[float]:
        """‖ΔW‖_F of every input."""
        return [math.sqrt(max(0.0, value)) for value in self.gram.diagonal().tolist()]

    def cosines(self) -> Matrix:
        """Of all pairs; None where one is zero."""
        norms = self.gram.diagonal().clamp(min=0.0).sqrt()
        return _matrix(self.gram / torch.outer(norms, norms), limit=1.0, same=1.0)

    def distances(self) -> Matrix:
        """Of all pairs, divided by the larger norm; None where both are zero."""
        norms = self.gram.diagonal().clamp(min=0.0).sqrt()
        return _matrix(
            self.squares.sqrt() / torch.maximum(norms[:, None], norms[None, :]), limit=2.0, same=0.0
        )


def module_pair(found: TargetFigures, first: int, second: int) -> ModulePair | None:
    """Two inputs on one target; None where neither changes it.

    Args:
        found: The target.
        first: Position of an input.
        second: Position of another.
    """
    places = [found.members.index(each) if each in found.members else None for each in (first, second)]
    if places == [None, None]:
        return None
    details = found.details
    energies = [0.0 if place is None else float(found.gram[place, place]) for place in places]
    ranks = [0 if place is None or details is None else int(details.ranks[place]) for place in places]
    product, square = 0.0, sum(energies)
    one, other = places
    if one is not None and other is not None:
        product, square = float(found.gram[one, other]), float(found.squares[one, other])
    relation = Relation(*_plain(energies[0], energies[1], product, square))
    angles: Angles = (None, None)
    if one is not None and other is not None and details is not None:
        relation, angles = _in_detail(relation, details, one, other)
    return ModulePair(
        target=str(found.target),
        component=found.target.component,
        norms=(math.sqrt(max(0.0, energies[0])), math.sqrt(max(0.0, energies[1]))),
        ranks=(ranks[0], ranks[1]),
        column_angle=angles[0],
        row_angle=angles[1],
        relation=relation,
    )


def _in_detail(relation: Relation, details: Details, one: int, other: int) -> tuple[Relation, Angles]:
    """A relation with what spaces and signs say, and the smallest angles of column and row spaces in degrees."""
    opposite, total = float(details.signs.opposite[one, other]), float(details.signs.total[one, other])
    relation = relation._replace(sign_conflict=opposite / total if total else None)
    smaller = float(details.smaller[one, other])
    if not smaller:
        return relation, (None, None)
    columns, rows = details.columns, details.rows
    both = columns.squares, rows.squares, columns.expected, rows.expected
    shares = [min(1.0, float(each[one, other]) / smaller) for each in both]
    relation = relation._replace(
        column_overlap=shares[0], row_overlap=shares[1], column_chance=shares[2], row_chance=shares[3]
    )
    return relation, (float(columns.angles[one, other]), float(rows.angles[one, other]))


def pairs_of(count: int) -> Iterator[tuple[int, int]]:
    """All pairs of positions, the first below the second."""
    return ((first, second) for first in range(count) for second in range(first + 1, count))


def _weighted(details: Details, gram: torch.Tensor) -> torch.Tensor:
    """(members, members, figures): the weight of each pair's means, the figures under it, and the sums of the signs."""
    norms = gram.diagonal().clamp(min=0.0).sqrt()
    weight = torch.where(details.smaller > 0.0, torch.outer(norms, norms), 0.0)
    share = weight / details.smaller.clamp(min=1.0)
    spaces = details.columns.squares, details.rows.squares, details.columns.expected, details.rows.expected
    return torch.stack([weight, *(share * each for each in spaces), *details.signs], dim=-1)


def _plain(
    first: float, second: float, product: float, square: float
) -> tuple[float | None, float | None, float | None]:
    """Cosine, ratio of norms and relative distance from two squared norms, an inner product, a squared distance."""
    one, other = math.sqrt(max(0.0, first)), math.sqrt(max(0.0, second))
    larger = max(one, other)
    cosine = max(-1.0, min(1.0, product / one / other)) if one and other else None
    return cosine, other / one if one else None, math.sqrt(max(0.0, square)) / larger if larger else None


def _matrix(values: torch.Tensor, *, limit: float, same: float) -> Matrix:
    """Rows of numbers, None for what is not one; of an input with itself, what that is by definition."""
    rows = values.clamp(-limit, limit).tolist()
    for index, row in enumerate(rows):
        row[index] = same if math.isfinite(row[index]) else row[index]
    return tuple(tuple(each if math.isfinite(each) else None for each in row) for row in rows)
