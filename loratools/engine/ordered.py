"""Results in the order of the tasks, whatever the order in which they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

Result = TypeVar("Result")


def in_order(results: Iterable[tuple[int, Result]]) -> Iterator[Result]:
    """What an engine's ``run`` gives, each result as soon as all before it are there.

    Sums over results are the same then on every engine.
    """
    early: dict[int, Result] = {}
    due = 0
    for number, result in results:
        early[number] = result
        while due in early:
            yield early.pop(due)
            due += 1
