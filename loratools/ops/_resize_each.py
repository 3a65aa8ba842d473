"""What is done to every module of a resize: several side by side on CPUs, in batches on accelerators."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from loratools import kinds
from loratools.engine import Engine, Item, Plan, kept
from loratools.errors import NonFiniteError
from loratools.model import Adapter, Module, Target
from loratools.ops import _batching
from loratools.ops._base_weights import Rowed, Weights
from loratools.ops._batching import OnDevices
from loratools.ops._resize_module import nonfinite
from loratools.ops._resize_options import Options
from loratools.ops._resize_store import Form

Progress = Callable[[str, int, int], None]
# A decomposition of factors takes about so many operations for each number in them and each of their ranks.
_OPERATIONS = 8.0
_COPIES = 6  # of the factors in float64, while they are decomposed


class Task(NamedTuple):
    """One module to work on: plain values and places in files, so that it can be worked on anywhere.

    Attributes:
        target: The weight.
        module: What changes it.
        base: Where the weights lie that ΔW depends on; None where it does not.
        against: Those that directions are scored against, or None.
        rank: That all modules together have decided on, a count; None where it decides for itself.
        device: Where it is worked on; empty for the form's own place.
    """

    target: Target
    module: Module
    base: Rowed | None = None
    against: Rowed | None = None
    rank: int | None = None
    device: str = ""


class Step(Protocol):
    """What is done to a module, as plain values that can be sent anywhere."""

    @property
    def place(self) -> str:
        """The device that it is done on unless the task says otherwise."""

    def single(self, task: Task, base: torch.Tensor | None, place: str) -> Any:
        """To one module, with the base weight that it needs."""

    def batch(self, tasks: Sequence[Task], bases: Sequence[torch.Tensor | None], place: str) -> Sequence[Any]:
        """To several of one make-up."""


class Work(NamedTuple):
    """An adapter, what is asked for, and where its base weights lie.

    Attributes:
        adapter: The input in the layout of the result.
        modules: Those that have a ΔW to be cut.
        asked: What was asked for.
        form: How results are stored.
        base: Weights of the model that it was trained on, for kinds whose ΔW depends on them.
        against: Weights that directions are scored against.
        threads: A count; None for one per processor.
        progress: Called with a module's name, its number and the count of all.
        batch: Bytes of float64 factors that are decomposed together; 0 for one module after the other.
        engine: Where modules are worked on; None for this machine.
    """

    adapter: Adapter
    modules: Mapping[Target, Module]
    asked: Options
    form: Form
    base: Weights | None
    against: Weights | None
    threads: int | None
    progress: Progress | None
    batch: int = 0
    engine: Engine | None = None


@dataclass(frozen=True)
class Attempt:
    """A step on modules some of which may hold NaN or Inf.

    Attributes:
        step: What is done.
    """

    step: Step

    def __call__(self, task: Task) -> Any:
        """The result of one module, or the keys of its tensors that hold NaN or Inf."""
        try:
            return self.step.single(task, _loaded(task), task.device or self.step.place)
        except NonFiniteError:
            # Decompositions find out by themselves; looking at every tensor beforehand would cost another reading.
            keys = nonfinite(task.module)
            if not keys:
                raise
            return keys

    def together(self, tasks: Sequence[Task], device: str) -> Sequence[Any]:
        """The results of modules that share a batch, or what is said of each by itself."""
        with suppress(NonFiniteError):  # of one of them at least: by itself each says so
            return self.step.batch(tasks, [_loaded(task) for task in tasks], device)
        return [self(task._replace(device=device)) for task in tasks]

    def alone(self, task: Task) -> Any:
        """The result of one module by the CPU."""
        return self(task._replace(device="cpu"))

    def alike(self, task: Task) -> Hashable:
        """What modules have in common that can share a batch; None of one that cannot."""
        # Base weights to score against are far larger than factors: no more than one module's are held at a time.
        return _batching.alike(task.module) if task.against is None else None

    def size(self, task: Task) -> int:
        """Bytes of float64 factors."""
        return _batching.module_bytes(task.module)


def each_module(
    work: Work,
    step: Step,
    kind: str,
    *,
    ranks: Mapping[Target, int],
    scored: bool = False,
    progress: Progress | None = None,
) -> dict[Target, Any]:
    """What is done to every module, several at a time.

    Args:
        work: The modules.
        step: What is done to them.
        kind: Of the tasks.
        ranks: Those that all modules together have decided on.
        scored: Whether with the weights that directions are scored against.
        progress: Told of every module that is done.

    Returns:
        By target, in the order of the modules.

    Raises:
        NonFiniteError: NaN or Inf in tensors; all are named.
    """
    tasks = list(_tasks(work, ranks, scored=scored))
    attempt = Attempt(step)
    items = [_item(attempt, task, kind) for task in tasks]
    here = OnDevices.of(work.engine, work.form.place, work.batch, work.threads)
    plan: Plan[Task, Any] = Plan(attempt, tasks, items, bind=_bound)
    results = kept.run(plan, work.engine, here, work.threads)
    found: dict[Target, Any] = {}
    bad: dict[Target, list[str]] = {}
    for done, (number, result) in enumerate(results, start=1):
        target = tasks[number].target
        if isinstance(result, list):
            bad[target] = result
        else:
            found[target] = result
        if progress is not None:
            progress(str(target), done, len(tasks))
    _refuse_nonfinite(work, [key for target in work.modules for key in bad.get(target, ())])
    return {target: found[target] for target in work.modules}


def needs_base(module: Module) -> bool:
    """Whether ΔW depends on the weight that the module changes."""
    return module.magnitude is not None or kinds.get(module.kind).needs_base


def _tasks(work: Work, ranks: Mapping[Target, int], *, scored: bool) -> Iterator[Task]:
    against = work.against if scored else None
    for target, module in work.modules.items():
        base = work.base.rows_of(module) if work.base is not None and needs_base(module) else None
        scores = against.rows_of(module) if against is not None else None
        yield Task(target, module, base, scores, ranks.get(target))


def _item(attempt: Attempt, task: Task, kind: str) -> Item:
    """What a module costs."""
    size = attempt.size(task)
    rows = [each for each in (task.base, task.against) if each is not None]
    weights = sum(each.bytes for each in rows)
    return Item(
        f"{task.target.component} {task.target}",
        read=sum(ref.nbytes for ref in task.module.factors.values()) + weights,
        memory=_COPIES * size + 2 * weights,
        cost=_OPERATIONS * size * (task.module.rank or math.isqrt(size)),
        kind=kind,
    )


def _bound(task: Task, device: str) -> Task:
    return task._replace(device=device)


def _loaded(task: Task) -> torch.Tensor | None:
    return task.base.load(task.module) if task.base is not None else None


def _refuse_nonfinite(work: Work, bad: list[str]) -> None:
    if bad:
        raise NonFiniteError(
            f"{len(bad)} tensors with NaN or Inf" if len(bad) > 1 else "a tensor with NaN or Inf",
            path=work.adapter.path or None,
            keys=bad,
            expected="Finite factors were expected",
            todo="The file is damaged, or its training diverged: use an earlier one",
        )
