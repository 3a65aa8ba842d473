"""An engine of processes, as a cluster's would be: what it sends and gets is pickled, and nothing else is shared."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from types import TracebackType
from typing import Any

from loratools.engine import Plan, Result, Task

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

    @property
    def remote(self) -> bool:
        return True

    @property
    def devices(self) -> tuple[str, ...]:
        return ()

    @property
    def device_kind(self) -> str:
        return "cpu"

    def run(self, plan: Plan[Task, Result]) -> Iterator[tuple[int, Result]]:
        """Results as they come, which is in any order."""
        waiting: dict[Future[bytes], int] = {}
        for number, task in enumerate(plan.tasks):
            data = pickle.dumps((plan.work, task))
            self.sent.append(len(data))
            waiting[self._pool.submit(_done, data)] = number
            if len(waiting) >= _AHEAD:
                yield from _taken(waiting)
        while waiting:
            yield from _taken(waiting)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()


def _taken(waiting: dict[Future[bytes], int]) -> Iterator[tuple[int, Any]]:
    """What is done, the last first: nothing may rest on the order."""
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in sorted(done, key=waiting.__getitem__, reverse=True):
        yield waiting.pop(future), pickle.loads(future.result())


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _done(data: bytes) -> bytes:
    # Bytes both ways: torch would pass tensors between the processes of one machine by shared memory.
    found: Any = pickle.loads(data)
    work, task = found
    return pickle.dumps(work(task))
