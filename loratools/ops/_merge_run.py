"""All targets of a merge as a plan: side by side on CPUs, in batches on accelerators."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from loratools.engine import Engine, Item, Plan, kept
from loratools.engine.kept import Results, table
from loratools.model import Module, Rows, Target
from loratools.ops import _batching, _combine, _combine_batch
from loratools.ops._batching import OnDevices, batch_bytes
from loratools.ops._combine import Combined
from loratools.ops._request import Request
from loratools.ops.align import Contribution

Progress = Callable[[str, int, int], None]

KIND = "merge"
# What survives an interrupted run.
RESULTS = Results(table(Combined, Module, Target, Rows), {KIND: Combined})
# A decomposition of stacked factors takes about so many operations for each number in them and each of their ranks.
_OPERATIONS = 8.0
_COPIES = 6  # of the factors in float64, while they are decomposed


class Goal(NamedTuple):
    """One target to be merged: plain values and places in files, so that it can be done anywhere.

    Attributes:
        target: The weight.
        contributions: What the inputs and the protected adapters bring to it.
        device: Where it is computed; empty for the request's own.
    """

    target: Target
    contributions: tuple[Contribution, ...]
    device: str = ""


@dataclass(frozen=True)
class Combining:
    """What is done with a target.

    Attributes:
        asked: What was asked for.
    """

    asked: Request

    def __call__(self, goal: Goal) -> Combined:
        """The result of one target, alone."""
        asked = replace(self.asked, device=goal.device) if goal.device else self.asked
        return _combine.combine(asked, goal.target, goal.contributions)

    def together(self, goals: Sequence[Goal], device: str) -> list[Combined]:
        """The results of targets that share a batch on a device."""
        asked = replace(self.asked, device=device)
        return _combine_batch.combined(
            asked, [_combine.begin(asked, goal.target, goal.contributions) for goal in goals]
        )

    def alone(self, goal: Goal) -> Combined:
        """The result of one target by the CPU."""
        return self(goal._replace(device="cpu"))

    def alike(self, goal: Goal) -> Hashable:
        """What targets have in common that can share a batch; None of one that cannot."""
        return _combine_batch.alike(_combine.begin(self.asked, goal.target, goal.contributions))

    def size(self, goal: Goal) -> int:
        """Bytes of float64 factors."""
        return sum(_batching.module_bytes(each.module) for each in goal.contributions)


def run(
    asked: Request,
    targets: Mapping[Target, Sequence[Contribution]],
    threads: int | None,
    progress: Progress | None,
    engine: Engine | None = None,
) -> dict[Target, Combined]:
    """Every target's result, in the order of the targets.

    Args:
        asked: What was asked for.
        targets: What the inputs bring to each.
        threads: How many are worked on side by side, a count; default: one per processor.
        progress: Called with the target's name, its number and the count of all.
        engine: Where they are computed; None for this machine.
    """
    work = Combining(sent(asked))
    goals = [Goal(target, tuple(found)) for target, found in targets.items()]
    plan = Plan(work, goals, [item_of(work, goal) for goal in goals], bind=_bound)
    here = OnDevices.of(engine, asked.device, batch_bytes(asked.device), threads)
    results: dict[Target, Combined] = {}
    for done, (number, result) in enumerate(kept.run(plan, engine, here, threads), start=1):
        goal = goals[number]
        results[goal.target] = _combine.completed(asked, goal.target, goal.contributions, result)
        if progress is not None:
            progress(str(goal.target), done, len(goals))
    return {target: results[target] for target in targets}


def sent(asked: Request) -> Request:
    """The request as a target needs it, wherever it is merged: how many inputs there are, not what is in them."""
    inputs = tuple(
        replace(adapter, modules={}, extras={}, metadata={}, config={}) for adapter in asked.adapters
    )
    return replace(asked, adapters=inputs, steps=replace(asked.steps, styles=()), base=None, said={})


def item_of(work: Combining, goal: Goal) -> Item:
    """What a target costs."""
    size = work.size(goal)
    rank = sum(each.module.rank or 0 for each in goal.contributions)
    return Item(
        f"{goal.target.component} {goal.target}",
        read=sum(ref.nbytes for each in goal.contributions for ref in each.module.factors.values()),
        memory=_COPIES * size,
        cost=_OPERATIONS * size * rank,
        kind=KIND,
    )


def _bound(goal: Goal, device: str) -> Goal:
    return goal._replace(device=device)
