"""How fast workers and storage are: what a prediction is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from loratools.engine import Item


class Speed(NamedTuple):
    """Of storage, in bytes per second.

    Attributes:
        worker: What one worker gets that has the storage to itself.
        together: What all workers get; no limit where each has its own.
        behind: Whether a worker goes on at once while the system takes the bytes to the storage: they have to be there
            when the run ends.
    """

    worker: float
    together: float = math.inf
    behind: bool = False


class Rates(NamedTuple):
    """Of the machines and the storage in question.

    Attributes:
        read: Speed of the inputs' storage.
        write: Speed of the output's storage.
        operation: Seconds of a floating-point operation, by the kind of task.
        task: Seconds of a task beside its operations, its reading and its writing, by its kind; 0 for others.
        batch: Seconds that it takes to send tasks to a worker, which waits for them.
        run: Seconds of what is done one after the other: planning, headers, imports, publishing.
        process: Bytes that a process holds before it works on anything.
        crowding: By what factor a task computes longer while all workers are busy, at least 1: what processors share.
    """

    read: Speed
    write: Speed
    operation: Mapping[str, float]
    task: Mapping[str, float]
    batch: float = 0.0
    run: float = 0.0
    process: int = 0
    crowding: float = 1.0

    def computing(self, item: Item) -> float:
        """Seconds of a task on one worker, without those for its bytes.

        Raises:
            KeyError: Nothing is known of its kind.
        """
        own = self.task.get(item.kind, 0.0) + (item.cost * self.operation[item.kind] if item.cost else 0.0)
        return own * self.crowding

    def alone(self, item: Item) -> float:
        """Seconds of a task on a worker that has the storage to itself.

        Raises:
            KeyError: Nothing is known of its kind.
        """
        moved = item.read / self.read.worker + item.written / self.write.worker
        return self.computing(item) + moved
