"""An engine for dry runs that have to compute to know what would be written: each plan is measured before it is run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from loratools.engine import Engine, Item, Plan, Result, Task, local
from loratools.engine.local import Local
from loratools.engine.predict import Rates, measure


class Pass(NamedTuple):
    """A plan that was run.

    Attributes:
        items: What its tasks cost.
        rates: How fast it can be run, without what is done one after the other.
    """

    items: Sequence[Item]
    rates: Rates


class Foreseen:
    """Runs plans on this machine whatever engine was asked for, and remembers what they would cost there.

    Attributes:
        passes: The plans so far.
    """

    def __init__(
        self,
        engine: Engine | None,
        workers: int,
        *,
        inputs: Sequence[str | os.PathLike[str]],
        output: str | os.PathLike[str],
    ) -> None:
        """Begin to count the time.

        Args:
            engine: The one that was asked for, or None.
            workers: Of it, a count.
            inputs: Local files that are read.
            output: What would be written; its folder is there.
        """
        self.passes: list[Pass] = []
        self._engine = engine
        self._workers = workers
        self._inputs, self._output = inputs, output
        self._began = time.perf_counter()
        self._inside = 0.0

    @property
    def remote(self) -> bool:
        """Tasks run in this process."""
        return False

    @property
    def devices(self) -> tuple[str, ...]:
        """Those of this machine that the engine has."""
        return () if self._engine is None else self._engine.devices

    @property
    def device_kind(self) -> str:
        """What the engine would have tasks computed on; see ``Engine``."""
        return "" if self._engine is None else self._engine.device_kind

    @property
    def outside(self) -> float:
        """Seconds since the beginning in which no plan was measured or run."""
        return time.perf_counter() - self._began - self._inside

    def run(self, plan: Plan[Task, Result], *, on: Engine | None = None) -> Iterator[tuple[int, Result]]:
        """As ``Engine.run``.

        Args:
            plan: The tasks.
            on: An engine of this process's devices that runs them; default: threads.

        Raises:
            OSError: An input cannot be read, or the output's folder cannot be written to.
        """
        started = time.perf_counter()
        try:
            if plan.tasks:
                self.passes.append(Pass(plan.items, self._measured(plan, on)))
            threads = min(self._workers, local.default_threads())
            yield from (on or Local(threads)).run(plan)
        finally:
            self._inside += time.perf_counter() - started

    def _measured(self, plan: Plan[Any, Any], on: Engine | None) -> Rates:
        if plan.bind is not None and on is not None and on.devices:
            plan = replace(plan, tasks=[plan.bind(task, on.devices[0]) for task in plan.tasks])
        return measure(
            plan,
            inputs=self._inputs,
            output=self._output,
            size=sum(item.read for item in plan.items),  # what comes of adapters is about as large
            workers=self._workers,
        )
