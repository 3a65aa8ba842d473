"""What a bake will take, from copying a little and computing a few tensors."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.io import storage
from loratools.io.regions import copy_range, preallocate
from loratools.ops._bake_run import Options
from loratools.ops._bake_shards import ShardPlan
from loratools.ops.checkpoint_results import BakeEstimate

if TYPE_CHECKING:
    from loratools.engine import Engine, Plan
    from loratools.engine.predict import Rates
    from loratools.ops._bake_write import Write, Written
    from loratools.ops.prediction_results import Estimate

_PROBED = 64 << 20  # bytes
_LITTLE = 4 << 10  # bytes, whose way to the disk is all waiting
_COPY = "copy"  # the kind of tasks that only move bytes


def estimate(
    shards: Sequence[ShardPlan],
    options: Options,
    output: str,
    *,
    planning: float = 0.0,
    engine: Engine | None = None,
) -> BakeEstimate:
    """What a bake will take.

    Args:
        shards: Its files.
        options: How tensors are computed.
        output: Where the output will lie: its disk is probed with 64 MiB, twice, that are removed again.
        planning: Seconds that it took to plan it, and will again.
        engine: Where it would run; None for this machine's threads.
    """
    files = [shard.shard.path for shard in shards if not storage.is_url(shard.shard.path)]
    copied = _copy_rate(max(files, key=os.path.getsize), output) if files else float("inf")
    started = time.perf_counter()
    # Only now: they bring torch, which a bake has to wait for, too.
    from loratools.engine.predict import measure
    from loratools.ops import _bake_run, _prediction
    from loratools.ops._bake_plan import plan_of

    planning += time.perf_counter() - started
    ready = _bake_run.usable(options, engine)
    plan = plan_of(shards, ready, lambda name: storage.below(output, name))
    workers = _prediction.workers_of(engine, options.threads)
    rates = measure(
        _some(plan, other=_COPY),
        inputs=files,
        output=output,
        size=sum(item.written for item in plan.items if item.kind == _COPY),
        planning=planning,
        workers=workers,
    )
    computing = sum(rates.computing(item) for item in plan.items if item.kind != _COPY) / workers
    changed = sum(change.weight.nbytes for shard in shards for change in shard.changes)
    whole = (
        _prediction.estimate(plan, _synced(rates), engine)
        if engine is not None and engine.remote
        else _here(plan, rates, copied, engine, options.threads)
    )
    return BakeEstimate(whole, copied, changed / computing if computing else float("inf"))


def _here(
    plan: Plan[Write, tuple[Written, ...]],
    rates: Rates,
    copied: float,
    engine: Engine | None,
    threads: int | None,
) -> Estimate:
    """On this machine, whose system copies what stays, and brings all to the disk, while tensors are computed."""
    from loratools.ops import _prediction

    found = _prediction.estimate(_some(plan, other=_COPY), rates, engine, threads)
    copies = [item for item in plan.items if item.kind == _COPY]
    size = sum(item.written for item in copies)
    written = found.written + size
    # The disk has what is copied to write as well.
    least = max(found.bound, size / copied, written / rates.write.together)
    seconds = max(found.seconds - rates.run, size / copied, written / rates.write.together)
    return found._replace(
        seconds=rates.run + seconds,
        read=found.read + sum(item.read for item in copies),
        written=written,
        tasks=found.tasks + len(copies),
        bound=least,
        efficiency=least / seconds if seconds else 1.0,
        read_rate=found.read_rate or (copied if size else None),
        write_rate=rates.write.together if written else None,
    )


def _some(plan: Plan[Write, tuple[Written, ...]], *, other: str) -> Plan[Write, tuple[Written, ...]]:
    """The tasks that are of another kind."""
    numbers = [number for number, item in enumerate(plan.items) if item.kind != other]
    return replace(
        plan,
        tasks=[plan.tasks[number] for number in numbers],
        items=[plan.items[number] for number in numbers],
    )


def _synced(rates: Rates) -> Rates:
    """The rates where each task brings what it wrote to the disk before it ends."""
    speed = rates.write
    return rates._replace(write=speed._replace(worker=min(speed.worker, speed.together), behind=False))


def _copy_rate(source: str, output: str) -> float:
    """Bytes per second from the base to the output's disk, beyond what next to nothing takes."""
    latency = _copied(source, output, _LITTLE)
    size = min(_PROBED, os.path.getsize(source))
    return max(1, size) / max(1e-6, _copied(source, output, size) - latency)


def _copied(source: str, output: str, size: int) -> float:
    """Seconds in which the first bytes of a file come to the output's disk."""
    size = min(size, os.path.getsize(source))
    folder = os.path.dirname(os.path.realpath(output))
    with open(source, "rb") as file, tempfile.TemporaryFile(dir=folder) as target:
        preallocate(target.fileno(), size)
        started = time.perf_counter()
        copy_range(file.fileno(), target.fileno(), 0, size, 0, path=source)
        os.fsync(target.fileno())
        return time.perf_counter() - started
