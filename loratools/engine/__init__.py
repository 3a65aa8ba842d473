"""Where the work on single modules and tensors runs: on this machine's threads, or wherever an engine sends it.

An operation that was checked becomes a plan: independent tasks, and what each of them costs. Work is a pure function of
one plain task: names, shapes, offsets in files and options, never an open file. Function, task and result can all be
pickled; what of a task lies in a file of its own is sent as the file's name and the place in it, so that whoever works
on it has to see the same files under the same names. What comes back, and what is written, depends on the task alone,
not on which engine, thread or device ran what before; a task that is run twice gives the same and writes the same bytes
at the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Item(NamedTuple):
    """What an executor knows of a task before it is run.

    Attributes:
        name: Of the tensor or module, for messages; tasks of one plan have different names.
        read: Bytes that it reads from storage.
        written: Bytes that it writes to storage.
        memory: Bytes that it holds at most while it runs.
        cost: Floating-point operations, estimated; 0 where it only moves bytes.
        kind: Tasks of one kind take time in proportion to their cost: "bake", "copy", "svd", "merge", …
    """

    name: str
    read: int = 0
    written: int = 0
    memory: int = 0
    cost: float = 0.0
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Plan(Generic[Task, Result]):
    """Independent tasks of one function.

    Attributes:
        work: What is done with each.
        tasks: In the order in which one worker does them.
        items: What each costs, in the same order.
        bind: The same task for a device ("cuda:1"), where devices share the work; None where tasks compute on CPUs.
        sample: As ``work``, but it writes nothing: what is timed for a prediction; None for ``work`` itself.
    """

    work: Callable[[Task], Result]
    tasks: Sequence[Task]
    items: Sequence[Item]
    bind: Callable[[Task, str], Task] | None = None
    sample: Callable[[Task], object] | None = None

    def __post_init__(self) -> None:
        if len(self.tasks) != len(self.items):
            raise ValueError(f"{len(self.tasks)} tasks, and {len(self.items)} items")


class Engine(Protocol):
    """Runs plans.

    An engine gives each task one thread of linear algebra (``torch.set_num_threads(1)``), since sums over several may
    be rounded otherwise. A task's exception is raised as it is, and the tasks that have not begun are dropped.
    """

    @property
    def remote(self) -> bool:
        """Whether tasks run in other processes, which write their own part of an output that was laid out before."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Those of this machine that share the work ("cuda:0", "cuda:1"); none on CPUs and other machines."""

    @property
    def device_kind(self) -> str:
        """What it has tasks computed on, "cpu" or "cuda"; empty where each says that by itself."""

    def run(self, plan: Plan[Task, Result]) -> Iterator[tuple[int, Result]]:
        """The number of each task in the plan with its result, as they are done, in any order."""
