"""How long tasks take, from running a few of each kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from statistics import fmean
from typing import NamedTuple, TypeVar

from loratools.engine import Item, Plan

Task = TypeVar("Task")
Result = TypeVar("Result")

# Of all operations of a kind, that tasks up to a sampled one make up; those first that say most.
_SHARES = (0.5, 0.75, 0.25, 0.875, 0.375, 0.625, 0.125, 0.9375, 0.4375, 0.6875, 0.1875)

_SLOWEST = 1e9  # operations per second of a processor
_LEAST = 0.1  # of the time for trying tasks, a fraction: for one kind
_TWO = 2  # tasks that were run when the first of another size comes: the smallest, twice
_OWN = 0.05  # of a task's time, a fraction: what it does beside reading, at least


class Sample(NamedTuple):
    """A task that was run.

    Attributes:
        cost: Floating-point operations.
        seconds: Without those that reading took.
    """

    cost: float
    seconds: float


class Timed(NamedTuple):
    """What running some tasks has shown.

    Attributes:
        operation: Seconds per floating-point operation, by kind.
        task: Seconds of a task beside its operations, by kind.
        bandwidth: Bytes per second that a task reads: no fewer than one of them has read, computing besides.
    """

    operation: dict[str, float]
    task: dict[str, float]
    bandwidth: float


def timed_tasks(plan: Plan[Task, Result], bandwidth: float, within: float) -> Timed:
    """Run a few tasks of each kind.

    Args:
        plan: The tasks.
        bandwidth: Bytes per second that a task reads, as far as is known; the time for them is not counted.
        within: Seconds that all of it may take, about.
    """
    kinds: dict[str, list[int]] = {}
    for number, item in enumerate(plan.items):
        kinds.setdefault(item.kind, []).append(number)
    costs = {kind: sum(plan.items[number].cost for number in numbers) for kind, numbers in kinds.items()}
    whole = sum(costs.values()) or 1.0
    ran = {
        # A little for each kind, and most for what makes up most of the work.
        kind: _ran(plan, sized(numbers, plan.items), bandwidth, within * max(_LEAST, costs[kind] / whole))
        for kind, numbers in kinds.items()
    }
    bandwidth = max([bandwidth, *(item.read / took for each in ran.values() for item, took in each)])
    operation: dict[str, float] = {}
    task: dict[str, float] = {}
    for kind, each in ran.items():
        task[kind], operation[kind] = _pace_of([_sample(item, took, bandwidth) for item, took in each])
    return Timed(operation, task, bandwidth)


def sized(numbers: Sequence[int], items: Sequence[Item]) -> list[int]:
    """The smallest task, and then those in the middle of what there is to compute."""
    ordered = sorted(numbers, key=lambda number: (items[number].cost, items[number].read))
    sums = list(accumulate(items[number].cost or 1.0 for number in ordered))
    chosen = [ordered[0]]
    for share in _SHARES:
        place = next(at for at, each in enumerate(sums) if each >= share * sums[-1])
        if ordered[place] not in chosen:
            chosen.append(ordered[place])
    return chosen


def line(samples: Sequence[Sample]) -> tuple[float, float]:
    """Seconds of a task without operations, and seconds per operation, that fit the samples; neither is negative.

    Least squares of the relative deviations: a small task counts as much as a large one.
    """
    ones = costs = squares = shares = products = 0.0
    for cost, seconds in samples:
        weight = 1.0 / max(seconds, 1e-9) ** 2
        ones += weight
        costs += weight * cost
        squares += weight * cost * cost
        shares += weight * seconds
        products += weight * cost * seconds
    spread = ones * squares - costs * costs
    if spread > 1e-9 * ones * squares:
        slope = (ones * products - costs * shares) / spread
        start = (shares - slope * costs) / ones
        if slope >= 0.0 and start >= 0.0:
            return start, slope
    return (0.0, products / squares) if squares else (shares / ones, 0.0)


def _ran(
    plan: Plan[Task, Result], numbers: Sequence[int], bandwidth: float, within: float
) -> list[tuple[Item, float]]:
    """Tasks that were run, and the seconds of each.

    As many as time allows, the first of them in any case; longer ones are left out.
    """
    work: Callable[[Task], object] = plan.sample or plan.work
    found: list[tuple[Item, float]] = []
    spent = 0.0
    for number in [numbers[0], *numbers]:  # the first of its kind prepares threads and kernels
        item = plan.items[number]
        samples = [_sample(*each, bandwidth) for each in found]
        # Two sizes say far more than one.
        limit = 2.0 * within if len(found) == _TWO else within
        if found and spent + _expected(samples, item) + item.read / bandwidth > limit:
            continue
        started = time.perf_counter()
        work(plan.tasks[number])
        took = max(1e-9, time.perf_counter() - started)
        spent += took if found else 0.0
        found.append((item, took))
    return found[1:] or found


def _sample(item: Item, took: float, bandwidth: float) -> Sample:
    """A task without its reading; some of the time is its own, since no storage's speed is known that exactly."""
    return Sample(item.cost, max(_OWN * took, took - item.read / bandwidth))


def _pace_of(samples: Sequence[Sample]) -> tuple[float, float]:
    """As ``line``; what would be a processor slower than any is taken for time beside the operations."""
    start, slope = line(samples)
    if slope <= 1.0 / _SLOWEST:
        return start, slope
    slope = 1.0 / _SLOWEST
    return max(0.0, fmean(seconds - slope * cost for cost, seconds in samples)), slope


def _expected(found: Sequence[Sample], item: Item) -> float:
    """Seconds that a task may take, by those that were run.

    What a small task takes need not be its operations, and is no more than that for each of those of a large one; nor
    is any processor slower than so many operations per second.
    """
    like = min(found[-1], found[0], key=lambda sample: abs(sample.cost - item.cost))
    more = max(0.0, item.cost - like.cost)
    in_proportion = like.seconds * more / like.cost if like.cost else 0.0
    return like.seconds + min(in_proportion, more / _SLOWEST)


def crowding(
    plan: Plan[Task, Result], taking: Callable[[Item], float], workers: int, within: float, most: int = 0
) -> float:
    """By what factor a task takes longer where so many threads are busy; 1 where none is seen.

    What threads of a machine share tells: caches, memory, the processor's clock, the interpreter's lock, and what other
    programs leave of the processors.

    Args:
        plan: The tasks; the one in the middle of what there is to compute is run, of those that time allows.
        taking: Seconds that a task takes by itself.
        workers: Threads, a count.
        within: Seconds that it may take, about.
        most: Bytes that all threads together may hold; 0 for no limit.
    """
    seconds = [taking(item) for item in plan.items]
    fitting = [number for number, each in enumerate(seconds) if each < within / 2]
    if not fitting or workers < 2:
        return 1.0
    fitting.sort(key=seconds.__getitem__)
    sums = list(accumulate(seconds[number] for number in fitting))
    chosen = fitting[next(at for at, each in enumerate(sums) if each >= sums[-1] / 2)]
    threads = min(workers, most // max(1, plan.items[chosen].memory)) if most else workers
    if threads < 2:
        return 1.0
    work, task = plan.sample or plan.work, plan.tasks[chosen]
    alone, beside = (_pace(work, task, count, within / 2) for count in (1, threads))
    return max(1.0, beside / alone)


def _pace(work: Callable[[Task], object], task: Task, threads: int, within: float) -> float:
    """Seconds of a task in each of some threads, which repeat it until time is up."""

    def repeated(_: int) -> float:
        work(task)  # the first in a thread prepares it
        started, times = time.perf_counter(), 0
        while not times or time.perf_counter() - started < within:
            work(task)
            times += 1
        return (time.perf_counter() - started) / times

    with ThreadPoolExecutor(threads, initializer=_one_thread) as pool:
        return fmean(pool.map(repeated, range(threads)))


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
