"""Work that processes of their own can import: on numbers, with what may go wrong on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loratools.engine import Item, Plan
from loratools.errors import MissingFileError, NonFiniteError


class Task(NamedTuple):
    """A number, and a folder in which a mark is left while it is worked on."""

    number: int
    folder: str = ""
    device: str = ""


def plan_of(work, tasks, **facts) -> Plan:
    """A plan of tasks that are so large that each is sent by itself."""
    items = [Item(str(number), **{"read": 1 << 30, **facts}) for number in range(len(tasks))]
    return Plan(work, tasks, items)


def square(task: Task) -> int:
    return task.number**2


def bound(task: Task, device: str) -> Task:
    return task._replace(device=device)


def where(task: Task) -> tuple[str, int]:
    """The device that the task was bound to, and how many threads torch has."""
    return task.device, torch.get_num_threads()


def refused(task: Task) -> int:
    if task.number == 2:
        raise NonFiniteError(
            "two", path="a.safetensors", keys=["k"], expected="Others were expected", todo="Train anew"
        )
    return task.number


def unpicklable(task: Task) -> int:
    error = ValueError("has a lock")
    error.lock = open(os.devnull)  # noqa: SIM115
    raise error


def unseen(task: Task) -> int:
    """A file that is not there for a worker, as one beside another node's disk is not."""
    raise MissingFileError("no such file", path=task.folder)


def crash_once(task: Task) -> int:
    """The first to come dies, as if the system had killed it for its memory."""
    mark = Path(task.folder, "crashed")
    if task.number == 1 and not mark.exists():
        mark.touch()
        os._exit(9)
    return square(task)


def crash(task: Task) -> int:
    os._exit(9)


def slow(task: Task) -> int:
    """Leaves a mark with its process when it begins, and is done when it is let."""
    Path(task.folder, f"{task.number}.{os.getpid()}").touch()
    go = Path(task.folder, "go")
    while not go.exists():
        time.sleep(0.02)
    return square(task)


@dataclass(frozen=True)
class Slowly:
    """Work that leaves a mark with its node and process when it begins; all but the first wait until they are let.

    Attributes:
        work: What is done.
        folder: Where the marks are, and "go" when all may go on.
        free: How many need not wait.
    """

    work: Callable[[Any], Any]
    folder: str
    free: int

    def __call__(self, task: Any) -> Any:
        """Wait, and do it."""
        name = f"{time.monotonic_ns()}.{_node()}.{os.getpid()}"
        Path(self.folder, name).touch()
        go = Path(self.folder, "go")
        if sum(1 for _ in Path(self.folder).iterdir()) <= self.free:
            return self.work(task)
        Path(self.folder, f"{name}.waits").touch()
        while not go.exists():
            time.sleep(0.02)
        return self.work(task)


def _node() -> str:
    import ray

    found: str = ray.get_runtime_context().get_node_id()
    return found


class Slowed(NamedTuple):
    """An engine whose tasks are slow.

    Attributes:
        engine: Where they run.
        folder: As for ``Slowly``.
        free: As for ``Slowly``.
    """

    engine: Any
    folder: str
    free: int = 3

    @property
    def remote(self) -> bool:
        return True

    @property
    def devices(self) -> tuple[str, ...]:
        return ()

    @property
    def device_kind(self) -> str:
        return "cpu"

    def run(self, plan: Plan) -> Iterator[tuple[int, Any]]:
        """Results as they come."""
        return self.engine.run(replace(plan, work=Slowly(plan.work, self.folder, self.free)))

    def marks(self, *, waiting: bool = False) -> list[tuple[str, int]]:
        """Node and process of each task that has begun, or of those that wait."""
        names = [each.name.split(".") for each in Path(self.folder).iterdir() if each.name != "go"]
        return [(name[1], int(name[2])) for name in names if (len(name) == 4) == waiting]

    def let(self) -> None:
        """Have all tasks go on."""
        Path(self.folder, "go").touch()
