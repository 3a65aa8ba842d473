"""One target of a comparison: the inputs' factors, and what they say of every pair."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from loratools import kinds
from loratools.errors import UnsupportedKindError
from loratools.kinds import lora
from loratools.maths import overlap, tiles
from loratools.maths.lowrank import COMPUTE, Factors, stack
from loratools.maths.overlap import Signs, Space
from loratools.model import Module, Target
from loratools.ops._base_weights import Weights
from loratools.ops.align import Contribution
from loratools.ops.as_lora import to_lora

# Below this share of the squared norms, a squared distance that was subtracted has lost too many digits.
_CLOSE = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What is the same for all targets.

    Attributes:
        weights: What the ΔW of each input is multiplied by.
        base: The base model's weights, for kinds that need them, or None.
        device: Where to compute.
        detailed: Whether spaces and signs are compared too.
        rows: How many rows of ΔW the sign conflict rests on, a count; 0 for all.
        lock: Held while the base is read, which threads share.
    """

    weights: tuple[float, ...]
    base: Weights | None
    device: str
    detailed: bool
    rows: int
    lock: threading.Lock = field(default_factory=threading.Lock)


class PairFigures(NamedTuple):
    """What spaces and signs say of two inputs on one target.

    Attributes:
        column_overlap: Mean squared cosine of the principal angles of the column spaces; None where one is zero.
        row_overlap: Of the row spaces.
        column_chance: Of random spaces of these dimensions.
        row_chance: Likewise.
        column_angle: The smallest angle, in degrees.
        row_angle: Likewise.
        signs: Sums over all rows, as far as they are known.
    """

    column_overlap: float | None
    row_overlap: float | None
    column_chance: float
    row_chance: float
    column_angle: float | None
    row_angle: float | None
    signs: Signs


@dataclass(frozen=True, slots=True, eq=False)
class TargetFigures:
    """What was found on one target.

    Attributes:
        target: The base weight.
        members: Positions of the inputs that change it, ascending.
        gram: (members, members) float64, their inner products.
        squares: (members, members) float64, their squared distances.
        ranks: Numerical ranks of the members; empty without details.
        pairs: Details by positions in ``members``.
        nonfinite: Keys that hold NaN or Inf, each with the position of its input.
        refused: Why an input's module cannot be computed, by the input's position.
    """

    target: Target
    members: tuple[int, ...]
    gram: torch.Tensor
    squares: torch.Tensor
    ranks: tuple[int, ...] = ()
    pairs: Mapping[tuple[int, int], PairFigures] = field(default_factory=dict)
    nonfinite: tuple[tuple[int, str], ...] = ()
    refused: tuple[tuple[int, str], ...] = ()


def compare_target(job: Job, target: Target, contributions: Sequence[Contribution]) -> TargetFigures:
    """Compare what several inputs bring to one target.

    NaN, Inf and kinds that cannot be computed are reported, not raised, so that the caller can name all of them.
    """
    members = tuple(sorted({each.source for each in contributions}))
    none = torch.zeros(len(members), len(members), dtype=COMPUTE)
    parts: list[Factors] = []
    scales: list[float] = []
    nonfinite: list[tuple[int, str]] = []
    refused: list[tuple[int, str]] = []
    for source in members:
        own = [each for each in contributions if each.source == source]
        try:
            part, scale = _joined(job, own)
        except UnsupportedKindError as error:
            refused.append((source, error.problem))
            continue
        nonfinite += [(source, name) for name in _nonfinite(own, part, scale)]
        parts.append(part)
        scales.append(scale * job.weights[source])
    if nonfinite or refused:
        return TargetFigures(target, members, none, none, nonfinite=tuple(nonfinite), refused=tuple(refused))
    if not job.detailed:
        gram = overlap.gram(parts, scales)
        return TargetFigures(target, members, gram, _squares(gram, parts, scales))
    return _detailed(job, target, members, parts, scales)


def _joined(job: Job, own: Sequence[Contribution]) -> tuple[Factors, float]:
    """What one input brings to a target as one pair of factors, and what multiplies their product."""
    found: list[tuple[Factors, float]] = []
    for each in own:
        module = _as_lora(job, each.module)
        up, down = lora.matrices(module, wide=False)
        found.append((Factors(each.place(up).to(job.device), down.to(job.device)), module.scale))
    if len(found) == 1:
        return found[0]
    return stack([part for part, _ in found], [scale for _, scale in found]), 1.0


def _as_lora(job: Job, module: Module) -> Module:
    """The module itself where it is a product of factors, else as exact float64 factors of its full rank."""
    if lora.is_product(module):
        return module
    weight = None
    if job.base is not None and needs_base(module):
        with job.lock:
            weight = job.base.of(module)
    return to_lora(module, base=weight, dtype="F64").module


def needs_base(module: Module) -> bool:
    """Whether the module's ΔW depends on the base weight."""
    return module.magnitude is not None or kinds.get(module.kind).needs_base


def _nonfinite(own: Sequence[Contribution], part: Factors, scale: float) -> list[str]:
    # A sum is NaN or Inf if any term is; only then is each tensor looked at.
    total = part.up.sum(dtype=COMPUTE) + part.down.sum(dtype=COMPUTE)
    if bool(torch.isfinite(total)) and math.isfinite(scale):
        return []
    found: list[str] = []
    for each in own:
        refs = [ref for _, ref in each.module.tensors()]
        found += [ref.name for ref in refs if not bool(torch.isfinite(ref.load().to(COMPUTE)).all())]
    return found or [f"the scale of {own[0].module.target}"]


def _squares(gram: torch.Tensor, parts: Sequence[Factors], scales: Sequence[float]) -> torch.Tensor:
    """The squared distances of all pairs, those of nearly equal matrices without cancellation."""
    norms = gram.diagonal()
    sums = norms[:, None] + norms[None, :]
    found = (sums - 2.0 * gram).clamp(min=0.0).fill_diagonal_(0.0)
    for first, second in torch.nonzero(torch.triu(found < _CLOSE * sums, diagonal=1)).tolist():
        scaled = scales[first], scales[second]
        exact = overlap.difference(parts[first], parts[second], scaled) ** 2
        found[first, second] = found[second, first] = exact
    return found


def _detailed(
    job: Job, target: Target, members: tuple[int, ...], parts: Sequence[Factors], scales: Sequence[float]
) -> TargetFigures:
    spaces = [overlap.space_of(part) for part in parts]
    plain = [space.factors for space in spaces]
    gram = overlap.gram(plain, scales)
    signs = _signs(job, target, plain, scales) if len(members) > 1 else {}
    pairs = {
        (first, second): _pair(spaces[first], spaces[second], signs[first, second])
        for second in range(len(members))
        for first in range(second)
    }
    return TargetFigures(
        target,
        members,
        gram,
        _squares(gram, plain, scales),
        ranks=tuple(space.rank for space in spaces),
        pairs=pairs,
    )


def _pair(one: Space, other: Space, signs: Signs) -> PairFigures:
    columns = overlap.principal_angles(one.columns, other.columns)
    rows = overlap.principal_angles(one.rows, other.rows)
    ranks = one.rank, other.rank
    return PairFigures(
        overlap.overlap(columns),
        overlap.overlap(rows),
        overlap.chance_overlap(ranks, len(one.columns)),
        overlap.chance_overlap(ranks, len(one.rows)),
        _degrees(columns),
        _degrees(rows),
        signs,
    )


def _degrees(angles: torch.Tensor) -> float | None:
    return math.degrees(float(angles[0])) if len(angles) else None


def _signs(
    job: Job, target: Target, parts: Sequence[Factors], scales: Sequence[float]
) -> dict[tuple[int, int], Signs]:
    """The sums of the sign conflict for every pair: over all rows, or over some that stand for all."""
    height = parts[0].shape[0]
    if job.rows:
        chosen = [overlap.sampled_rows(str(target), height, job.rows)]
    else:
        chosen = list(torch.split(torch.arange(height), tiles.tile_height(parts[0].shape)))
    seen = sum(len(rows) for rows in chosen)
    totals: dict[tuple[int, int], Signs] = {}
    for rows in chosen:
        tile = [
            (part.up[rows.to(part.up.device)] @ part.down) * scale
            for part, scale in zip(parts, scales, strict=True)
        ]
        for pair, found in overlap.sign_sums(tile).items():
            before = totals.get(pair, Signs(0.0, 0.0))
            totals[pair] = Signs(before.opposite + found.opposite, before.total + found.total)
    share = height / max(1, seen)
    return {pair: Signs(found.opposite * share, found.total * share) for pair, found in totals.items()}
