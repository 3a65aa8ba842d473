"""Independent tasks on the threads of this machine.

Each task runs its linear algebra on one thread, and several tasks run side by side: the matrices of one module are too
small to be shared out well, and results do not depend on how many threads there are.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 4


class Local(NamedTuple):
    """The engine of this machine.

    Attributes:
        threads: A count; None for one per processor.
    """

    threads: int | None = None

    def run(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """``work`` of every task, in the order of the tasks; see ``run``."""
        return run(work, tasks, threads=self.threads)


def default_threads() -> int:
    """How many threads to use: OMP_NUM_THREADS where it is set, else one per processor of this process."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    if stated.isdigit() and int(stated):
        return int(stated)
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def run(
    work: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    threads: int | None = None,
    size: Callable[[Task], int] | None = None,
    most: int = 0,
) -> Iterator[Result]:
    """``work`` of every task, in the order of the tasks.

    No more than a few tasks per thread are taken ahead of the results that have been asked for, so that memory stays
    bounded. An exception of a task is raised in its place, and tasks that have not begun are dropped.

    Args:
        work: Called on another thread.
        tasks: Taken from the caller's thread.
        threads: A count; default: one per processor.
        size: Bytes that a task needs until its result is asked for; default: nothing that counts.
        most: Of these bytes at a time; a task that needs more by itself has no other beside it.
    """
    count = threads or default_threads()
    waiting: deque[tuple[Future[Result], int]] = deque()
    queue, upcoming = iter(tasks), deque[tuple[Task, int]]()

    def submit() -> None:
        while len(waiting) < count * _AHEAD:
            if not upcoming:
                upcoming.extend((task, size(task) if size else 0) for task in islice(queue, 1))
            held = sum(each for _, each in waiting)
            if not upcoming or (waiting and held + upcoming[0][1] > most):
                return
            task, own = upcoming.popleft()
            waiting.append((pool.submit(work, task), own))

    with _single_threaded_algebra(), ThreadPoolExecutor(count, initializer=_one_thread) as pool:
        try:
            submit()
            while waiting:
                result = waiting.popleft()[0].result()
                submit()
                yield result
        finally:
            for future, _ in waiting:
                future.cancel()


def _one_thread() -> None:
    torch.set_num_threads(1)


@contextmanager
def _single_threaded_algebra() -> Iterator[None]:
    """Leave torch's setting as it was: some of it is the whole process's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
