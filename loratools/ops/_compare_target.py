"""One target of a comparison: the inputs' factors, and what they say of every pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from loratools import kinds
from loratools.engine import Item
from loratools.errors import UnsupportedKindError
from loratools.kinds import experts, lora
from loratools.maths.lowrank import COMPUTE, Factors, stack
from loratools.model import Module, Target
from loratools.ops._base_weights import Weights
from loratools.ops._compare_matrix import Details, Matrix, block_diagonal, compare_matrix
from loratools.ops.align import Contribution
from loratools.ops.as_lora import to_lora

_COPIES = 4  # of the factors in float64, that are held at a time
_PRODUCTS = 4  # of all columns with each other: inner products, distances, and the bases of two spaces


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What is the same for all targets.

    Attributes:
        weights: What the ΔW of each input is multiplied by.
        base: The base model's weights, for kinds that need them, or None.
        device: Where to compute.
        detailed: Whether spaces and signs are compared too.
        rows: How many rows of ΔW the sign conflict rests on, a count; 0 for all.
        angles: Whether the smallest principal angles are wanted.
    """

    weights: tuple[float, ...]
    base: Weights | None
    device: str
    detailed: bool
    rows: int
    angles: bool


class Task(NamedTuple):
    """One target.

    Attributes:
        target: The base weight.
        contributions: What the inputs bring to it.
        device: Where to compute; empty for the job's.
    """

    target: Target
    contributions: tuple[Contribution, ...]
    device: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class TargetFigures:
    """What was found on one target.

    Attributes:
        target: The base weight.
        members: Positions of the inputs that change it, ascending.
        gram: (members, members) float64, their inner products.
        squares: (members, members) float64, their squared distances.
        details: What spaces and signs say of the members; None where they were not asked for.
        nonfinite: Keys that hold NaN or Inf, each with the position of its input.
        refused: Why an input's module cannot be computed, by the input's position.
    """

    target: Target
    members: tuple[int, ...]
    gram: torch.Tensor
    squares: torch.Tensor
    details: Details | None = None
    nonfinite: tuple[tuple[int, str], ...] = ()
    refused: tuple[tuple[int, str], ...] = ()


def work(job: Job, task: Task) -> TargetFigures:
    """The figures of one target: a pure function of plain values, which may run in another process."""
    own = replace(job, device=task.device) if task.device else job
    return compare_target(own, task.target, task.contributions)


def bound(task: Task, device: str) -> Task:
    """The task for a device."""
    return task._replace(device=device)


def item(task: Task) -> Item:
    """What comparing on one target costs an executor.

    Factors are stacked side by side in float64, and a few products of (rank, rank) are made of all their columns.
    """
    refs = [ref for each in task.contributions for _, ref in each.module.tensors()]
    wide = COMPUTE.itemsize * sum(math.prod(ref.shape) for ref in refs)
    columns = sum(each.module.rank or 1 for each in task.contributions)
    return Item(
        str(task.target),
        read=sum(ref.nbytes for ref in refs),
        memory=_COPIES * wide,
        cost=2.0 * _PRODUCTS * columns * wide / COMPUTE.itemsize,
        kind="compare",
    )


def compare_target(job: Job, target: Target, contributions: Sequence[Contribution]) -> TargetFigures:
    """Compare what several inputs bring to one target.

    NaN, Inf and kinds that cannot be computed are reported, not raised, so that the caller can name all of them.
    """
    members = tuple(sorted({each.source for each in contributions}))
    brought: list[list[Matrix]] = []
    nonfinite: list[tuple[int, str]] = []
    refused: list[tuple[int, str]] = []
    for source in members:
        own = [each for each in contributions if each.source == source]
        try:
            matrices = _matrices(job, own)
        except UnsupportedKindError as error:
            refused.append((source, error.problem))
            continue
        nonfinite += [(source, name) for name in _nonfinite(own, matrices)]
        brought.append(matrices)
    if nonfinite or refused:
        none = torch.zeros(len(members), len(members), dtype=COMPUTE)
        return TargetFigures(target, members, none, none, nonfinite=tuple(nonfinite), refused=tuple(refused))
    found = block_diagonal(
        [
            compare_matrix(each, name=str(target), detailed=job.detailed, rows=job.rows, angles=job.angles)
            for each in zip(*brought, strict=True)
        ]
    )
    return TargetFigures(target, members, found.gram, found.squares, found.details)


def _matrices(job: Job, own: Sequence[Contribution]) -> list[Matrix]:
    """What one input brings to a target: a matrix, or one for each of its fused experts."""
    weight = job.weights[own[0].source]
    if is_experts(own[0].module):
        module = own[0].module
        up, down = (module.factors[role].load().to(job.device) for role in ("up", "down"))
        return [
            Matrix(Factors(*each), module.scale * weight)
            for each in zip(up.unbind(), down.unbind(), strict=True)
        ]
    found: list[tuple[Factors, float]] = []
    for each in own:
        module = _as_lora(job, each.module)
        up, down = lora.matrices(module, wide=False)
        found.append((Factors(each.place(up).to(job.device), down.to(job.device)), module.scale))
    if len(found) == 1:
        (part, scale), *_ = found
        return [Matrix(part, scale * weight)]
    return [Matrix(stack([part for part, _ in found], [scale for _, scale in found]), weight)]


def is_experts(module: Module) -> bool:
    """Whether the module is of fused experts, each of which has its factors in a place of its own."""
    return module.kind == "experts" and experts.is_stacked(module.factors)


def _as_lora(job: Job, module: Module) -> Module:
    """The module itself where it is a product of factors, else as exact float64 factors of its full rank."""
    if lora.is_product(module):
        return module
    weight = None
    if job.base is not None and needs_base(module):
        weight = job.base.of(module)
    return to_lora(module, base=weight, dtype="F64").module


def needs_base(module: Module) -> bool:
    """Whether the module's ΔW depends on the base weight: on its values, or on how many experts it is of."""
    packed = module.kind == "experts" and not is_experts(module)
    return packed or module.magnitude is not None or kinds.get(module.kind).needs_base


def _nonfinite(own: Sequence[Contribution], matrices: Sequence[Matrix]) -> list[str]:
    # A sum is NaN or Inf if any term is; only then is each tensor looked at.
    sums = [part.up.sum(dtype=COMPUTE) + part.down.sum(dtype=COMPUTE) for part, _ in matrices]
    if bool(torch.stack(sums).isfinite().all()) and math.isfinite(matrices[0].scale):
        return []
    found: list[str] = []
    for each in own:
        refs = [ref for _, ref in each.module.tensors()]
        found += [ref.name for ref in refs if not bool(torch.isfinite(ref.load().to(COMPUTE)).all())]
    return found or [f"the scale of {own[0].module.target}"]
