"""The jobs of an extraction as a plan, and the engine that does them on accelerators, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from loratools.engine import Engine, Item, Plan, Result, kept
from loratools.engine import Task as AnyTask
from loratools.engine.kept import Results, table
from loratools.engine.local import Local
from loratools.ops import _extract_batched
from loratools.ops._extract_jobs import job_bytes
from loratools.ops._extract_memory import memory_of, most_kept
from loratools.ops._extract_modules import Parted, parted
from loratools.ops._extract_tensor import FACTORS, FULL, NORM, Found, Job, extract_tensor
from loratools.tensors import DTYPES

# What survives an interrupted run.
RESULTS = Results(table(Parted, Found), dict.fromkeys((FACTORS, FULL, NORM), Parted))
# Matrices that a device is given at a time where several share the work: as many as are decomposed together.
_SHARE = 32
# Floating-point operations for each value of a matrix and each singular value, of either way to decompose it.
_EXACT, _RANDOMIZED = 8.0, 16.0


class Task(NamedTuple):
    """A job, and the device that it is done on; empty for the CPU."""

    job: Job
    device: str = ""


def plan_of(jobs: Sequence[Job], *, apart: bool = False) -> Plan[Task, Parted]:
    """The jobs as a plan.

    Args:
        jobs: Of any task.
        apart: Whether other processes do them, which put each result on the disk.
    """
    return Plan(
        extracted, [Task(job) for job in jobs], [item_of(job, apart=apart) for job in jobs], bind=_bound
    )


def extracted(task: Task) -> Parted:
    """What becomes of one job."""
    if not task.device:
        return parted(extract_tensor(task.job))
    (found,) = _extract_batched.run([task.job], task.device)
    return parted(found)


def item_of(job: Job, *, apart: bool = False) -> Item:
    """What a job costs.

    Args:
        job: Of any task.
        apart: Whether its result goes to the disk.
    """
    size, most = job.matrix[0] * job.matrix[1], min(job.matrix)
    cost = float(size)
    result = size if job.task == FULL else 0
    if job.task == FACTORS:
        rule = job.rule
        rank = most if rule is None or rule.kind != "rank" else min(most, int(rule.value))
        cost *= _EXACT * most if job.method == "exact" or rank == most else _RANDOMIZED * rank
        result = most_kept(job) * sum(job.matrix)
    written = result * DTYPES[job.store].bits // 8 if apart else 0
    return Item(f"{job.number} {job.name}", job_bytes(job), written, memory_of(job), cost, job.task)


def run(engine: Engine | None, jobs: Sequence[Job], device: str, threads: int | None) -> Iterator[Parted]:
    """The results of all jobs, in any order: they carry their numbers.

    Args:
        engine: Where they are done; None for this machine.
        jobs: Of any task.
        device: Of this machine, where the engine is none of other machines.
        threads: How many are done side by side on CPUs, a count; None for one per processor.
    """
    devices = () if engine is None else engine.devices
    here = OnDevices(devices or (device,)) if devices or device != "cpu" else None
    apart = engine is not None and engine.remote
    for _, found in kept.run(plan_of(jobs, apart=apart), engine, here, threads):
        yield found


class OnDevices(NamedTuple):
    """An engine of accelerators of this machine, for jobs of extractions."""

    devices: tuple[str, ...]

    @property
    def remote(self) -> bool:
        """Tasks run in this process."""
        return False

    @property
    def device_kind(self) -> str:
        """That of its devices."""
        return self.devices[0].partition(":")[0]

    def run(self, plan: Plan[AnyTask, Result]) -> Iterator[tuple[int, Result]]:
        """The number of each task with its result, in any order; matrices of one shape go together."""
        given: Any = plan.tasks
        numbers = {task.job.number: number for number, task in enumerate(given)}
        found: Any
        for found in self._found([task.job for task in given]):
            yield numbers[found.number], _as_result(found)

    def _found(self, jobs: list[Job]) -> Iterator[Found]:
        if len(self.devices) == 1:
            yield from _extract_batched.run(jobs, self.devices[0])
            return
        shares = [_Share(tuple(part)) for part in _alike(jobs)]
        items = [Item(str(number), memory=_memory(share.jobs)) for number, share in enumerate(shares)]
        for _, done in Local(devices=self.devices).run(Plan(_done, shares, items, bind=_share_bound)):
            yield from done


class _Share(NamedTuple):
    """Jobs that a device is given together."""

    jobs: tuple[Job, ...]
    device: str = "cpu"


def _done(share: _Share) -> list[Found]:
    return list(_extract_batched.run(share.jobs, share.device))


def _share_bound(share: _Share, device: str) -> _Share:
    return share._replace(device=device)


def _bound(task: Task, device: str) -> Task:
    return task._replace(device=device)


def _as_result(found: Found) -> Any:
    return parted(found)


def _alike(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs of one shape, as many as are decomposed together."""
    for _, same in groupby(
        sorted(jobs, key=lambda job: (job.task, job.matrix)), lambda job: (job.task, job.matrix)
    ):
        group = list(same)
        for start in range(0, len(group), _SHARE):
            yield group[start : start + _SHARE]


def _memory(jobs: Sequence[Job]) -> int:
    return sum(map(memory_of, jobs))
