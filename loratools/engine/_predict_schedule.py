"""What workers do when: each takes the next batch of tasks as soon as it is free, and all share the storage.

Every task reads, computes and writes, in this order. Transfers under way at one time share the storage's bandwidth
evenly, so that all of them have been given the same number of bytes since any moment: a heap of how much that will be
when each of them ends says which is next, whatever begins or ends meanwhile.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from loratools.engine import Item
from loratools.engine._predict_rates import Rates, Speed

_READ, _COMPUTE, _WRITE = range(3)
Step = tuple[int, float]  # what is done, and the bytes or seconds of it


class Outcome(NamedTuple):
    """How a run went.

    Attributes:
        seconds: From the first batch until all is done and on the storage.
        peak: Bytes that the tasks under way held at most, of all workers together.
    """

    seconds: float
    peak: int


def simulate(
    items: Sequence[Item], batches: Sequence[Sequence[int]], rates: Rates, workers: int, most: int = 0
) -> Outcome:
    """Let workers take batches in their order.

    Args:
        items: The tasks.
        batches: Numbers of tasks that are sent to a worker together.
        rates: How fast workers and storage are.
        workers: A count.
        most: Bytes that the tasks under way may hold; a batch that needs more waits until it is alone. 0 for no limit.
    """
    return _Simulation(items, batches, rates, workers, most).run()


class _Shared:
    """Storage whose bandwidth transfers share evenly."""

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self._served = 0.0  # bytes that a transfer has been given that is under way since the beginning
        self._now = 0.0
        self._ends: list[tuple[float, int]] = []

    def begin(self, now: float, size: float, worker: int) -> None:
        self._pass(now)
        heapq.heappush(self._ends, (self._served + size, worker))

    def due(self) -> float:
        """When the next transfer ends, if none begins before."""
        if not self._ends:
            return math.inf
        return self._now + max(0.0, self._ends[0][0] - self._served) / self._rate()

    def end(self, now: float) -> int:
        """End the next transfer, and say whose it was."""
        self._pass(now)
        return heapq.heappop(self._ends)[1]

    def _pass(self, now: float) -> None:
        if self._ends:
            self._served += (now - self._now) * self._rate()
        self._now = now

    def _rate(self) -> float:
        return min(self._speed.worker, self._speed.together / len(self._ends))


class _Simulation:
    def __init__(
        self,
        items: Sequence[Item],
        batches: Sequence[Sequence[int]],
        rates: Rates,
        workers: int,
        most: int,
    ) -> None:
        self._items, self._rates, self._most = items, rates, most
        self._waiting = deque(batches)
        self._idle = list(range(min(workers, len(batches))))
        self._steps: dict[int, Iterator[Step]] = {}  # what is left of each busy worker's batch
        self._sizes: dict[int, int] = {}  # bytes that each busy worker holds
        self._computing: list[tuple[float, int]] = []
        self._storages = {_READ: _Shared(rates.read), _WRITE: _Shared(rates.write)}
        self._written = 0.0  # when all is on a storage that is written behind the workers
        self._held = self._peak = 0

    def run(self) -> Outcome:
        now = 0.0
        self._send(now)
        while self._steps:
            now, what = min(self._due())
            worker = heapq.heappop(self._computing)[1] if what == _COMPUTE else self._storages[what].end(now)
            if not self._go_on(worker, now):
                self._send(now)
        return Outcome(max(now, self._written), self._peak)

    def _due(self) -> Iterator[tuple[float, int]]:
        """When the next step of each sort ends."""
        if self._computing:
            yield self._computing[0][0], _COMPUTE
        for what, storage in self._storages.items():
            yield storage.due(), what

    def _send(self, now: float) -> None:
        """Give idle workers the next batches, as far as memory goes."""
        while self._idle and self._waiting:
            size = max(self._items[number].memory for number in self._waiting[0])
            if self._most and self._steps and self._held + size > self._most:
                return
            worker = self._idle.pop()
            self._steps[worker] = self._of(self._waiting.popleft())
            self._sizes[worker] = size
            self._held += size
            self._peak = max(self._peak, self._held)
            self._go_on(worker, now)

    def _of(self, batch: Sequence[int]) -> Iterator[Step]:
        """What a worker does for a batch."""
        delay = self._rates.batch
        for number in batch:
            item = self._items[number]
            if delay:
                yield _COMPUTE, delay
            if item.read:
                yield _READ, item.read
            yield _COMPUTE, self._rates.computing(item)
            if item.written:
                yield _WRITE, item.written
            delay = 0.0

    def _go_on(self, worker: int, now: float) -> bool:
        """Begin the worker's next step; whether there is one."""
        step = next(self._steps[worker], None)
        if step is None:
            del self._steps[worker]
            self._held -= self._sizes.pop(worker)
            self._idle.append(worker)
            return False
        what, amount = step
        if what == _WRITE and self._rates.write.behind:
            now += amount / self._rates.write.worker
            self._written = max(self._written, now) + amount / self._rates.write.together
            what = _COMPUTE
        elif what == _COMPUTE:
            now += amount
        if what == _COMPUTE:
            heapq.heappush(self._computing, (now, worker))
        else:
            self._storages[what].begin(now, amount, worker)
        return True
