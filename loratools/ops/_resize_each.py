"""What is done to every module of a resize: several side by side on the CPU, in batches on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

from loratools import kinds
from loratools.errors import NonFiniteError
from loratools.model import Adapter, Module, Target
from loratools.ops import _batching
from loratools.ops._base_weights import Weights
from loratools.ops._resize_module import nonfinite
from loratools.ops._resize_options import Options
from loratools.ops._resize_store import Form

Progress = Callable[[str, int, int], None]
Result = TypeVar("Result")


class Task(NamedTuple):
    """One module to work on, with the base weights that this takes."""

    target: Target
    module: Module
    base: torch.Tensor | None
    against: torch.Tensor | None = None


@dataclass(frozen=True)
class Steps(Generic[Result]):
    """What is done to a module.

    Attributes:
        single: To one, on a device.
        batch: To several of one make-up, on the device of the work.
    """

    single: Callable[[Task, str], Result]
    batch: Callable[[list[Task]], list[Result]]

    def attempt(self, task: Task, place: str) -> Result | list[str]:
        """The result of one module, or the keys of its tensors that hold NaN or Inf."""
        try:
            return self.single(task, place)
        except NonFiniteError:
            # Decompositions find out by themselves; looking at every tensor beforehand would cost another reading.
            keys = nonfinite(task.module)
            if not keys:
                raise
            return keys


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


def each_module(
    work: Work, steps: Steps[Result], *, scored: bool, progress: Progress | None = None
) -> dict[Target, Result]:
    """What is done to every module, several at a time.

    Args:
        work: The modules.
        steps: What is done to them.
        scored: Whether with the weights that directions are scored against.
        progress: Told of every module that is done.

    Returns:
        By target, in the order of the modules.

    Raises:
        NonFiniteError: NaN or Inf in tensors; all are named.
    """
    results = _batching.run(
        lambda tasks: _several(work, steps, tasks),
        lambda task: steps.attempt(task, "cpu"),
        _batches(work, scored=scored),
        work.form.place,
        size=lambda task: _batching.module_bytes(task.module) if work.batch else 0,
        threads=work.threads,
    )
    found: dict[Target, Result] = {}
    bad: dict[Target, list[str]] = {}
    for number, (task, result) in enumerate(results, start=1):
        if isinstance(result, list):
            bad[task.target] = result
        else:
            found[task.target] = result
        if progress is not None:
            progress(str(task.target), number, len(work.modules))
    _refuse_nonfinite(work, [key for target in work.modules for key in bad.get(target, ())])
    return {target: found[target] for target in work.modules}


def _several(work: Work, steps: Steps[Result], tasks: list[Task]) -> Sequence[Result | list[str]]:
    """The results of modules that share a batch, or what ``attempt`` says of each."""
    if work.batch:
        with suppress(NonFiniteError):  # of one of them at least: by itself each says so
            return steps.batch(tasks)
    return [steps.attempt(task, work.form.place) for task in tasks]


def _refuse_nonfinite(work: Work, bad: list[str]) -> None:
    if bad:
        raise NonFiniteError(
            f"{len(bad)} tensors with NaN or Inf" if len(bad) > 1 else "a tensor with NaN or Inf",
            path=work.adapter.path or None,
            keys=bad,
            expected="Finite factors were expected",
            todo="The file is damaged, or its training diverged: use an earlier one",
        )


def _batches(work: Work, *, scored: bool) -> Iterator[list[Task]]:
    """The modules, with their base weights loaded a few ahead of the work."""
    against = work.against if scored else None

    def key(item: tuple[Target, Module]) -> Hashable:
        # Base weights to score against are far larger than factors: no more than one module's are held at a time.
        return _batching.alike(item[1]) if work.batch and against is None else None

    def task(target: Target, module: Module) -> Task:
        base = work.base.of(module) if work.base is not None and needs_base(module) else None
        return Task(target, module, base, against.of(module) if against is not None else None)

    def size(item: tuple[Target, Module]) -> int:
        return _batching.module_bytes(item[1])

    for batch in _batching.gathered(work.modules.items(), key, size, work.batch):
        yield [task(*item) for item in batch]


def needs_base(module: Module) -> bool:
    """Whether ΔW depends on the weight that the module changes."""
    return module.magnitude is not None or kinds.get(module.kind).needs_base
