"""An engine of processes, as a cluster's would be: what it sends and gets is pickled, and nothing else is shared."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 4


class Processes:
    """Other processes, which share files with this one and nothing else.

    Attributes:
        sent: Size of each task as it was sent, in bytes.
    """

    def __init__(self, count: int = 2) -> None:
        # Nothing is inherited: a process that is spawned begins with what it is sent.
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_one_thread)
        self.sent: list[int] = []

    def run(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        waiting: deque[Future[bytes]] = deque()
        for task in tasks:
            data = pickle.dumps((work, task))
            self.sent.append(len(data))
            waiting.append(self._pool.submit(_done, data))
            if len(waiting) >= _AHEAD:
                yield pickle.loads(waiting.popleft().result())
        while waiting:
            yield pickle.loads(waiting.popleft().result())

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _done(data: bytes) -> bytes:
    # Bytes both ways: torch would pass tensors between the processes of one machine by shared memory.
    found: Any = pickle.loads(data)
    work, task = found
    return pickle.dumps(work(task))
