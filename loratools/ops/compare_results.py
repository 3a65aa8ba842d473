"""What a comparison finds, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Matrix = tuple[tuple[float | None, ...], ...]


class Relation(NamedTuple):
    """How one change ΔW relates to another, in one module or over many side by side.

    A figure is None where it has no meaning (one of the two is zero) or was not computed.

    Attributes:
        cosine: ⟨first, second⟩ / (‖first‖ · ‖second‖), in [-1, 1].
        ratio: ‖second‖_F / ‖first‖_F.
        distance: ‖first − second‖_F divided by the larger norm: 0 for the same change, 2 for opposite ones.
        column_overlap: Mean squared cosine of the principal angles of the column spaces (outputs), in [0, 1]. Over
            many modules, their mean weighted by ‖first‖ · ‖second‖, as for the next three.
        row_overlap: Of the row spaces (inputs).
        column_chance: What ``column_overlap`` would be for random spaces of the same dimensions.
        row_chance: What ``row_overlap`` would be.
        sign_conflict: Σ |a·b| over elements of opposite signs by Σ |a·b| over all, in [0, 1]; about 0.5 for
            unrelated changes.
    """

    cosine: float | None
    ratio: float | None
    distance: float | None
    column_overlap: float | None = None
    row_overlap: float | None = None
    column_chance: float | None = None
    row_chance: float | None = None
    sign_conflict: float | None = None


class ModulePair(NamedTuple):
    """Two adapters on one target.

    Attributes:
        target: The base weight.
        component: Its component.
        norms: ‖ΔW‖_F of the first and of the second, weight included; 0 for one that lacks the module.
        ranks: Their numerical ranks, counts.
        column_angle: The smallest principal angle of the column spaces, in degrees; None where one is zero.
        row_angle: Of the row spaces.
        relation: All else.
    """

    target: str
    component: str
    norms: tuple[float, float]
    ranks: tuple[int, int]
    column_angle: float | None
    row_angle: float | None
    relation: Relation


class ComparedPair(NamedTuple):
    """Two adapters.

    Attributes:
        first: Position of one.
        second: Position of the other.
        shared: How many targets both change.
        verdict: "same" (the distance is within ``tolerance``), "scaled" (so it is once one is multiplied by
            ``multiple``), "different", or "zero" (one of them changes nothing).
        multiple: ⟨first, second⟩ / ‖first‖²: the multiple of the first that is nearest to the second.
        tolerance: What rounding to the coarser of their store dtypes may make of ``distance``.
        relation: Overall.
        components: By component.
        modules: By target; empty where they were not asked for.
    """

    first: int
    second: int
    shared: int
    verdict: str
    multiple: float | None
    tolerance: float
    relation: Relation
    components: Mapping[str, Relation]
    modules: tuple[ModulePair, ...] = ()


class ComparedAdapter(NamedTuple):
    """One input.

    Attributes:
        path: Where it was read from, or empty.
        layout: Its layout.
        kinds: How many modules there are of each kind.
        ranks: How many modules have each rank; 0 for kinds that have none.
        weight: What its ΔW was multiplied by.
        targets: How many of the compared targets it changes.
        norm: ‖ΔW‖_F over all of them, weight included.
        missing: Targets that others change and it does not; its ΔW counts as 0 there.
    """

    path: str
    layout: str
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    weight: float
    targets: int
    norm: float
    missing: tuple[str, ...]


class Suggestion(NamedTuple):
    """Which merge method suits the adapters.

    Attributes:
        method: Its name.
        weights: What to multiply the adapters by, one each.
        reasons: Why, in sentences.
        figures: What the choice rests on, by name.
    """

    method: str
    weights: tuple[float, ...]
    reasons: tuple[str, ...]
    figures: Mapping[str, float | None]


class CompareReport(NamedTuple):
    """How adapters relate.

    Attributes:
        adapters: The inputs, in order.
        arch: Their architecture.
        targets: How many base weights were compared.
        cosines: Of all pairs, overall; None where one is zero.
        distances: Of all pairs, overall, as ``Relation.distance``.
        same: Positions of adapters with the same ΔW, group by group.
        pairs: In full, where the adapters are few enough.
        sampled_rows: How many rows of each ΔW the sign conflict rests on, at most; 0 for all of them, None where it
            was not computed.
        suggestion: None where it was not asked for.
        notes: What the reader should know.
    """

    adapters: tuple[ComparedAdapter, ...]
    arch: str
    targets: int
    cosines: Matrix
    distances: Matrix
    same: tuple[tuple[int, ...], ...]
    pairs: tuple[ComparedPair, ...]
    sampled_rows: int | None
    suggestion: Suggestion | None = None
    notes: tuple[str, ...] = ()
