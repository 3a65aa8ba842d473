"""Independent tasks on the threads of this machine.

Each task runs its linear algebra on one thread, and several tasks run side by side: the matrices of one module are too
small to be shared out well, and results do not depend on how many threads there are.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from typing import NamedTuple, TypeVar

import torch

from loratools.engine import Plan, memory
from loratools.errors import EngineError

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 4


class Local(NamedTuple):
    """The engine of this machine: threads, or a thread for each of its devices.

    Results come in the order of the tasks. Those that are under way, and those that are done and not asked for yet, are
    a few for each thread, and hold half of the machine's memory at most, unless a single one needs more.

    Attributes:
        threads: A count; None for one per processor. Tasks on devices have a thread for each device instead.
        devices: Those that share the work ("cuda:0", "cuda:1"): each takes the next task when it is done with one.
            Empty for the CPUs, which work on plans without ``bind`` in any case.
    """

    threads: int | None = None
    devices: tuple[str, ...] = ()

    @property
    def remote(self) -> bool:
        """Tasks run in this process."""
        return False

    @property
    def device_kind(self) -> str:
        """That of its devices; see ``Engine``."""
        return self.devices[0].partition(":")[0] if self.devices else ""

    def run(self, plan: Plan[Task, Result]) -> Iterator[tuple[int, Result]]:
        """The number of each task with its result, in the order of the tasks; see ``Engine``."""
        items, most = plan.items, memory.installed() // 2
        results = run(
            _on_devices(plan, self.devices),
            range(len(plan.tasks)),
            threads=len(self.devices) if plan.bind is not None and self.devices else self.threads,
            size=(lambda number: items[number].memory) if most else None,
            most=most,
        )
        with closing(results):
            yield from enumerate(results)


def _on_devices(plan: Plan[Task, Result], devices: tuple[str, ...]) -> Callable[[int], Result]:
    """The work on a task by its number, for a thread that keeps the device that it begins with."""
    if plan.bind is None or not devices:
        return lambda number: plan.work(plan.tasks[number])
    bind, free, own = plan.bind, deque(devices), threading.local()

    def work(number: int) -> Result:
        if not hasattr(own, "device"):
            own.device = free.popleft()
        return plan.work(bind(plan.tasks[number], own.device))

    return work


def present(names: Sequence[str] | None = None) -> tuple[str, ...]:
    """GPUs of this machine.

    Args:
        names: "cuda:0", "cuda:1", …; None for all that there are.

    Returns:
        Their names.

    Raises:
        EngineError: There is none, or not all of those named.
    """
    found = tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    missing = [name for name in names or () if name not in found]
    if missing or not found:
        raise EngineError(
            f"torch finds {len(found)} GPUs here",
            keys=missing,
            candidates=found,
            expected="A GPU of each of the names that were given was expected"
            if names
            else "One at least was expected",
            todo="Leave --devices away to compute as usual, or check the driver and CUDA_VISIBLE_DEVICES",
        )
    return found if names is None else tuple(names)


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
) -> Generator[Result, None, None]:
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
