"""Results that survive the process: an engine whose journal and part files say what is done.

What a task gives is described in the journal as JSON, its tensors as places in part files (``_kept_codec``,
``_kept_parts``). Tasks that run elsewhere write their tensors themselves, and have them on the disk before they report,
so that no tensor passes through the process that hands out tasks. Of tasks that run in this process, results stay in
memory and are put away once a second, all that have come meanwhile: a run that is over within the first second writes
nothing but its output.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, NamedTuple

from loratools.engine import Engine, Plan, Result, Task
from loratools.engine._kept_codec import DamagedError, decoded, encoded
from loratools.engine._kept_parts import PartFile, head, held, place
from loratools.engine._kept_types import fits
from loratools.engine.foreseen import Foreseen
from loratools.engine.local import Local
from loratools.errors import LoraError
from loratools.io.work_folder import Identity, WorkFolder

__all__ = ["Kept", "Results", "head", "held", "run", "table"]

_EVERY = 1.0  # seconds between two times that results are put away
_FILES = 4  # part files that a process which works for several runs has open
_NOTHING = object()
# What a journal that somebody has written to may come to when it is read.
_UNSOUND = (DamagedError, LoraError, OSError, TypeError, ValueError, ArithmeticError, RecursionError)


class Results(NamedTuple):
    """What tasks give.

    Attributes:
        classes: Named tuples and frozen dataclasses that are found in it, by name; see ``table``.
        kinds: The type of what a task gives, by its item's kind.
    """

    classes: Mapping[str, type]
    kinds: Mapping[str, Any]


def table(*classes: type) -> dict[str, type]:
    """Classes by name."""
    return {each.__name__: each for each in classes}


class Kept:
    """An engine that passes tasks on to another, but for those that an interrupted run has done; a context.

    Results are valid inside of the context. A run that ends with an error leaves what it has done where it is to be
    resumed, and nothing otherwise.

    Attributes:
        taken: How many tasks' results are those of the interrupted run.
    """

    def __init__(
        self,
        engine: Engine,
        output: str | os.PathLike[str],
        identity: Identity | Callable[[], Identity],
        results: Results,
        *,
        resume: bool = False,
    ) -> None:
        """Nothing is done before the context is entered.

        Args:
            engine: What runs the tasks.
            output: The file or folder that the run will write.
            identity: What decides what is written; or what tells, called once when it is needed.
            results: What tasks give.
            resume: Go on with an interrupted run, and keep what is done if this one is interrupted.
        """
        self.taken = 0
        self._engine = engine
        self._results = results
        self._folder = WorkFolder(output, identity, resume=resume, sync=self._sync)
        self._part: PartFile | None = None
        self._token = os.urandom(8).hex()
        self._passes = 0
        self._waiting: list[tuple[str, Any]] = []
        self._settled = time.monotonic()

    @property
    def remote(self) -> bool:
        """Whether the tasks run elsewhere."""
        return self._engine.remote

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of this machine that share the work; none where the engine has none."""
        return self._engine.devices

    @property
    def device_kind(self) -> str:
        """What the engine has tasks computed on; see ``Engine``."""
        return self._engine.device_kind

    @property
    def notes(self) -> tuple[str, ...]:
        """What became of an interrupted run that was to be gone on with, in sentences; none where none was."""
        folder = self._folder
        if not folder.resume:
            return ()
        if folder.fresh_reason:
            return (f"nothing to resume: {folder.fresh_reason}",)
        return (f"of {len(folder.done):,} results of the interrupted run, {self.taken:,} were taken over",)

    def __enter__(self) -> Kept:
        """Take up an interrupted run, or sweep it; see ``WorkFolder``.

        Raises:
            OutputExistsError: Another process writes this output.
            OptionError: The interrupted run was of other inputs or options.
            WriteError: The system refuses.
        """
        self._folder.__enter__()
        self._settled = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was kept, unless the run failed and is to be resumed."""
        try:
            if error is not None and self._folder.resume:
                with suppress(OSError):  # a full or read-only disk must not hide why
                    self._settle()
        finally:
            part, self._part = self._part, None  # what is noted behind this is told from its checksum
            if part is not None:
                part.close()
            self._folder.__exit__(kind, error, trace)

    def run(self, plan: Plan[Task, Result], *, on: Engine | None = None) -> Iterator[tuple[int, Result]]:
        """As ``Engine.run``; the results of an interrupted run come first.

        The plans of a run follow each other in the same order whenever it is repeated.

        Args:
            plan: The tasks.
            on: An engine of this process that runs what is left to be done; default: the one that was given.
        """
        number, self._passes = self._passes, self._passes + 1
        return self._run(plan, [f"{number}/{item.name}" for item in plan.items], on or self._engine)

    def _run(
        self, plan: Plan[Task, Result], names: list[str], engine: Engine
    ) -> Iterator[tuple[int, Result]]:
        left: list[int] = []
        for number, name in enumerate(names):
            found = self._done(name, plan.items[number].kind)
            if found is _NOTHING:
                left.append(number)
            else:
                self.taken += 1
                yield number, found
        rest = replace(
            plan, tasks=[plan.tasks[each] for each in left], items=[plan.items[each] for each in left]
        )
        run = self._elsewhere if engine.remote else self._here
        for number, result in run(rest, [names[each] for each in left], engine):
            yield left[number], result

    def _done(self, name: str, kind: str) -> Any:
        """The result of a task that the interrupted run has done; nothing where it is not whole any more."""
        if name not in self._folder.done:
            return _NOTHING
        try:
            found = decoded(
                self._folder.done[name],
                self._results.classes,
                lambda said: place(os.fspath(self._folder.path), said, check=True),
            )
        except _UNSOUND:
            return _NOTHING
        return found if fits(found, self._results.kinds[kind]) else _NOTHING

    def _elsewhere(
        self, plan: Plan[Task, Result], names: list[str], engine: Engine
    ) -> Iterator[tuple[int, Result]]:
        folder, classes = os.fspath(self._folder.path), self._results.classes
        work = _PutAway(plan.work, folder, self._token, classes)
        told: Plan[Task, Any] = Plan(work, plan.tasks, plan.items, plan.bind, plan.sample or plan.work)
        for number, said in engine.run(told):
            found = decoded(said, classes, lambda where: place(folder, where, check=False))
            self._folder.record(names[number], said)
            yield number, found

    def _here(
        self, plan: Plan[Task, Result], names: list[str], engine: Engine
    ) -> Iterator[tuple[int, Result]]:
        for number, result in engine.run(plan):
            self._waiting.append((names[number], result))
            if time.monotonic() - self._settled >= _EVERY:
                self._settle()
            yield number, result

    def _settle(self) -> None:
        """Put away what has come since the last time."""
        self._settled = time.monotonic()
        if not self._waiting:
            return
        if self._part is None:
            self._part = PartFile(os.fspath(self._folder.path))
        for name, result in self._waiting:
            self._folder.record(name, encoded(result, self._results.classes, self._part.put))
        self._waiting = []
        self._folder.flush()

    def _sync(self) -> None:
        if self._part is not None:
            self._part.sync()


def run(
    plan: Plan[Task, Result], engine: Engine | None, here: Engine | None, threads: int | None
) -> Iterator[tuple[int, Result]]:
    """A plan's results, kept where the engine keeps them.

    Args:
        plan: The tasks.
        engine: The one that was asked for, or None.
        here: The one of this process's devices that the tasks go to all the same; None where there are none.
        threads: Of this machine where no engine was asked for, a count; None for one per processor.
    """
    if isinstance(engine, Kept | Foreseen):
        return engine.run(plan, on=here)
    return (here or engine or Local(threads)).run(plan)


@dataclass(frozen=True)
class _PutAway(Generic[Task]):
    """A task's work, whose result stays where it was computed, on the disk.

    Attributes:
        work: What is done with a task.
        folder: The work folder.
        token: Of the run: a folder of this name may have been removed and made again since the last one.
        classes: See ``Results``.
    """

    work: Callable[[Task], Any]
    folder: str
    token: str
    classes: Mapping[str, type]

    def __call__(self, task: Task) -> Any:
        """What is known of the result, as JSON can hold it."""
        part = _part_of(self.folder, self.token)
        said = encoded(self.work(task), self.classes, part.put)
        part.sync()
        return said


_parts: OrderedDict[tuple[str, str], PartFile] = OrderedDict()
_turn = threading.Lock()


def _part_of(folder: str, token: str) -> PartFile:
    """This process's own file for a run."""
    with _turn:
        if (folder, token) not in _parts:
            _parts[folder, token] = PartFile(folder)
            if len(_parts) > _FILES:
                _parts.popitem(last=False)  # closed once no thread writes to it any more
        return _parts[folder, token]
