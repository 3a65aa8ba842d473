"""What a plan would take on an engine: for dry runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

from loratools.engine import Engine, Item, Plan, local, memory
from loratools.engine.foreseen import Foreseen
from loratools.engine.predict import Rates, predict
from loratools.io import storage
from loratools.ops import files
from loratools.ops.prediction_results import Estimate

Task = TypeVar("Task")
Result = TypeVar("Result")


def workers_of(engine: Engine | None, threads: int | None) -> int:
    """How many tasks run at a time, a count.

    Args:
        engine: Where they run; None for this machine's threads.
        threads: How many of those, a count; None for one per processor.
    """
    if engine is None:
        return threads or local.default_threads()
    if isinstance(engine, local.Local):
        return len(engine.devices) or engine.threads or local.default_threads()
    asked: int | None = getattr(engine, "workers", None)
    return asked or local.default_threads()


def estimate(
    plan: Plan[Task, Result],
    rates: Rates,
    engine: Engine | None,
    threads: int | None = None,
    *,
    assembled: int = 0,
) -> Estimate:
    """What the plan would take.

    Args:
        plan: The tasks; other arguments as for ``estimated``.
        rates: As they were measured.
        engine: Where they would run.
        threads: How many of those, a count.
        assembled: Bytes that are written at the end.
    """
    return estimated(plan.items, rates, engine, threads, assembled=assembled)


def estimated(
    items: Sequence[Item],
    rates: Rates,
    engine: Engine | None,
    threads: int | None = None,
    *,
    assembled: int = 0,
) -> Estimate:
    """What tasks would take.

    Args:
        items: The tasks.
        rates: As they were measured.
        engine: Where they would run; None for this machine's threads.
        threads: How many of those, a count; None for one per processor.
        assembled: Bytes that are written at the end, one after the other, beside what tasks write.
    """
    workers = workers_of(engine, threads)
    remote = engine is not None and engine.remote
    if assembled:
        last = assembled / rates.write.worker + assembled / rates.write.together
        rates = rates._replace(run=rates.run + last)
    found = predict(
        items,
        rates,
        workers,
        most=0 if remote else memory.installed() // 2,
        processes=remote,
    )
    written = found.written + assembled
    return Estimate(
        found.seconds,
        found.workers,
        found.sequential,
        found.read,
        written,
        found.memory,
        found.peak,
        found.bound,
        found.efficiency,
        found.tasks,
        rates.read.worker if found.read else None,
        rates.write.together if written else None,
    )


def foreseeing(
    engine: Engine | None,
    threads: int | None,
    *,
    inputs: Iterable[files.PathLike],
    output: files.PathLike,
) -> Foreseen:
    """An engine for a dry run that computes what it tells.

    Args:
        engine: The one that was asked for, or None.
        threads: Of this machine where there is none, a count; None for one per processor.
        inputs: The adapters.
        output: What would be written.
    """
    found = [os.fspath(path) for path in inputs if not storage.is_url(path)]
    weights = [files.weights_of(path) if storage.is_dir(path) else path for path in found]
    present = [path for path in weights if path is not None]
    return Foreseen(engine, workers_of(engine, threads), inputs=present, output=output)


def foreseen(
    found: Foreseen, engine: Engine | None, threads: int | None, *, assembled: int = 0
) -> Estimate | None:
    """What the plans of a dry run would take one after the other; None where there were none.

    Args:
        found: The engine of the dry run.
        engine: The one that was asked for, or None.
        threads: Of this machine where there is none, a count; None for one per processor.
        assembled: Bytes that are written at the end, beside what tasks write.
    """
    last = len(found.passes) - 1
    parts = [
        estimated(
            each.items,
            each.rates._replace(run=found.outside if number == 0 else 0.0),
            engine,
            threads,
            assembled=assembled if number == last else 0,
        )
        for number, each in enumerate(found.passes)
    ]
    return _one_after_the_other(parts) if parts else None


def _one_after_the_other(parts: Sequence[Estimate]) -> Estimate:
    seconds, sequential, bound = (
        sum(getattr(part, name) for part in parts) for name in ("seconds", "sequential", "bound")
    )
    return parts[-1]._replace(
        seconds=seconds,
        sequential=sequential,
        read=sum(part.read for part in parts),
        written=sum(part.written for part in parts),
        memory=max(part.memory for part in parts),
        peak=max(part.peak for part in parts),
        bound=bound,
        efficiency=min(1.0, bound / (seconds - sequential)) if seconds > sequential else 1.0,
        tasks=sum(part.tasks for part in parts),
    )
