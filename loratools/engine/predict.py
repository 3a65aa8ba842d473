"""How long a plan will take, and what it moves and holds, before it is run.

:func:`measure` finds out in seconds how fast this machine and the storage in question are, and :func:`predict` lets
workers take the plan's tasks in the order in which an engine would send them. What a prediction cannot know: other
programs, a storage that is faster for what was read lately, and workers that are unlike the machine that was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loratools.engine import Item
from loratools.engine._cut import cut
from loratools.engine._predict_probe import measure
from loratools.engine._predict_rates import Rates, Speed
from loratools.engine._predict_schedule import simulate

__all__ = ["Prediction", "Rates", "Speed", "bound", "measure", "predict"]


class Prediction(NamedTuple):
    """What a plan comes to on so many workers.

    Attributes:
        workers: A count.
        seconds: From the start to the end, ``sequential`` included.
        sequential: Seconds of them in which one thing is done after the other, however many workers there are.
        read: Bytes that all tasks read.
        written: Bytes that all tasks write.
        memory: Bytes that a worker holds at most: a process that works on the largest task.
        peak: Bytes that all workers together hold at most.
        bound: Seconds that no order of the tasks can undercut; see :func:`bound`.
        efficiency: ``bound`` by ``seconds``, both without ``sequential``; in (0, 1].
        tasks: How many tasks.
        batches: How many times tasks are sent to a worker.
    """

    workers: int
    seconds: float
    sequential: float
    read: int
    written: int
    memory: int
    peak: int
    bound: float
    efficiency: float
    tasks: int
    batches: int


def predict(
    items: Sequence[Item],
    rates: Rates,
    workers: int,
    *,
    batches: Sequence[Sequence[int]] | None = None,
    most: int = 0,
    processes: bool = False,
) -> Prediction:
    """What tasks come to on so many workers.

    Args:
        items: The tasks.
        rates: How fast workers and storage are.
        workers: A count.
        batches: Numbers of tasks that are sent together, in the order in which they are sent; default: as engines cut
            and order them for processes, and for threads each task by itself, as the plan has them.
        most: Bytes that tasks under way may hold; see ``simulate``. 0 for no limit.
        processes: Whether each worker is a process of its own.

    Raises:
        ValueError: There is no worker.
        KeyError: Nothing is known of a kind of task that computes.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers")
    if batches is None:
        batches = cut(items, workers) if processes else [(number,) for number in range(len(items))]
    found = simulate(items, batches, rates, workers, most)
    least = bound(items, rates, workers)
    started = max(1, min(workers, len(batches))) if processes else 1
    return Prediction(
        workers=workers,
        seconds=rates.run + found.seconds,
        sequential=rates.run,
        read=sum(item.read for item in items),
        written=sum(item.written for item in items),
        memory=rates.process + max((item.memory for item in items), default=0),
        peak=started * rates.process + found.peak,
        bound=least,
        efficiency=least / found.seconds if found.seconds else 1.0,
        tasks=len(items),
        batches=len(batches),
    )


def bound(items: Sequence[Item], rates: Rates, workers: int) -> float:
    """Seconds that no order of the tasks on so many workers can undercut.

    The most of three: all work in equal shares, the longest task, and all bytes at the bandwidth of the storage.

    Raises:
        KeyError: Nothing is known of a kind of task that computes.
    """
    alone = [rates.alone(item) for item in items]
    return max(
        sum(alone) / workers,
        max(alone, default=0.0),
        sum(item.read for item in items) / rates.read.together,
        sum(item.written for item in items) / rates.write.together,
    )
