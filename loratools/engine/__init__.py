"""Where the work on single modules runs: on this machine's threads, or wherever an engine of the same shape sends it.

Work is a pure function of one plain task: names, shapes, offsets in files and options, never an open file. Function,
task and result can all be pickled; what of a task lies in a file of its own is sent as the file's name and the place in
it, so that whoever works on it has to see the same files under the same names. What comes back depends on the task
alone, not on which engine, thread or device ran what before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs tasks.

    An engine gives each task one thread of linear algebra (``torch.set_num_threads(1)``), since sums over several may
    be rounded otherwise, and raises a task's exception in its place among the results.
    """

    def run(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """``work`` of every task, in the order of the tasks, few of them ahead of what was asked for."""
