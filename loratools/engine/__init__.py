"""Where the work on single modules runs: on this machine's threads, or wherever an engine of the same shape sends it.

Work is a pure function of one plain task: names, shapes, offsets in files and options, never an open file. What it
returns depends on its task alone, not on which engine, thread or device ran what before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs tasks."""

    def run(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """``work`` of every task, in the order of the tasks, few of them ahead of what was asked for."""
