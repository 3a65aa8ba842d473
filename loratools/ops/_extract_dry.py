"""What an extraction would find and how long it would take, from decomposing a few of its matrices."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from loratools.engine import Plan
from loratools.engine.predict import measure
from loratools.io import storage
from loratools.ops import _extract_on, _extract_run, _prediction
from loratools.ops._extract_jobs import Work
from loratools.ops._extract_modules import Extracted, Parted
from loratools.ops._extract_report import blank
from loratools.ops._extract_tensor import FACTORS, FULL, Found, Job, extract_tensor
from loratools.ops.checkpoint_results import ExtractedModule, ExtractReport
from loratools.ops.prediction_results import Estimate
from loratools.tensors import DTYPES, LazySource, TensorRef

if TYPE_CHECKING:
    from loratools.ops._extract_run import Extraction

# Shapes whose ranks are found out by decomposing one of each, those first that make up most of the work.
_SAMPLES = 4
_WITHIN = 2.0  # seconds that it may take; the first is decomposed in any case


def report(planned: Extraction, *, planning: float = 0.0) -> ExtractReport:
    """What would be written and how long it would take, were all weights changed as the sampled ones are.

    The modules have no norms: their differences were not computed.

    Args:
        planned: What is to be done.
        planning: Seconds that it took to plan it, and will again.
    """
    jobs = [_affordable(planned, job) for job in planned.work.jobs]
    kept = placeholders(planned.work, _ranks(jobs))
    size = _extract_run.size_of(planned, kept) if kept else 0
    if planned.options.kind == "size":
        size = min(size, int(planned.options.value))
    return blank(planned)._replace(
        modules=tuple(_module(each) for each in kept),
        bytes=size,
        energy=0.0,
        estimate=_estimate(planned, jobs, size, planning),
    )


def _estimate(planned: Extraction, jobs: list[Job], size: int, planning: float) -> Estimate:
    """What the jobs would take where they would be done, and writing so many bytes of an adapter in the end."""
    plan = _extract_on.plan_of(jobs, apart=planned.engine is not None and planned.engine.remote)
    files = [shard.path for side in (planned.base, planned.tuned) for shard in side.base.shards]
    output = planned.output or None
    rates = measure(
        _on_device(plan, planned.device),
        inputs=[path for path in files if not storage.is_url(path)],
        output=output,
        size=size,
        planning=planning,
        workers=_prediction.workers_of(planned.engine, planned.threads),
    )
    return _prediction.estimate(
        plan, rates, planned.engine, planned.threads, assembled=size if output is not None else 0
    )


def _on_device(plan: Plan[_extract_on.Task, Parted], device: str) -> Plan[_extract_on.Task, Parted]:
    """The plan as the device would run it: what is tried is tried there."""
    if device == "cpu" or plan.bind is None:
        return plan
    return replace(plan, tasks=[plan.bind(task, device) for task in plan.tasks])


def _ranks(jobs: list[Job]) -> dict[int, int]:
    """The rank of each module: as the rule states it, or as was found for its shape, or for most others."""
    groups: dict[tuple[int, int], list[Job]] = {}
    for job in jobs:
        if job.task == FACTORS:
            groups.setdefault(job.matrix, []).append(job)
    found = _tried(sorted(groups.values(), key=lambda alike: -len(alike) * _effort(alike[0])))
    usual = int(median(found.values())) if found else 1
    ranks: dict[int, int] = {}
    for job in jobs:
        if job.task == FACTORS:
            stated = int(job.rule.value) if job.rule is not None and job.rule.kind == "rank" else None
            rank = found.get(job.matrix, usual) if stated is None else stated
            ranks[job.number] = max(1, min(rank, *job.matrix))
    return ranks


def _tried(groups: list[list[Job]]) -> dict[tuple[int, int], int]:
    """The ranks that a rule gives the first of some shapes, as far as they change and time allows."""
    found: dict[tuple[int, int], int] = {}
    ends = time.monotonic() + _WITHIN
    for job, *_ in groups[:_SAMPLES]:
        if (job.rule is None or job.rule.kind != "rank") and (not found or time.monotonic() < ends):
            rank = len(extract_tensor(job).sigma)
            found.update({job.matrix: rank} if rank else {})
    return found


def _effort(job: Job) -> int:
    return job.matrix[0] * job.matrix[1] * min(job.matrix)


def _affordable(planned: Extraction, job: Job) -> Job:
    """The job with the rank that it would have if a size were spent evenly."""
    if planned.options.kind != "size" or job.rule is None:
        return job
    bits = DTYPES[planned.work.dtype].bits
    costs = sum(sum(each.matrix) * bits // 8 for each in planned.work.jobs if each.task == FACTORS)
    rank = max(job.rule.least, int(planned.options.value) // max(1, costs))
    return job._replace(rule=job.rule._replace(value=min(rank, job.rule.value)))


def placeholders(work: Work, ranks: dict[int, int] | None = None) -> list[Extracted]:
    """Results as they would be, with zeros for data; of rank 1 unless told otherwise."""
    return list(_placeholders(work, ranks or {}))


def _placeholders(work: Work, ranks: dict[int, int]) -> Iterable[Extracted]:
    for job in work.jobs:
        stored = work.pairs[job.number].stored
        if job.task == FULL:
            yield Extracted(stored, Found(job.number), full=_zeros(stored.shape, job.store))
        elif job.task == FACTORS:
            rank = ranks.get(job.number, 1)
            found = Found(job.number, sigma=(0.0,) * rank)
            up, down = (_zeros((rank, side), job.store) for side in job.matrix)
            yield Extracted(stored, found, up, down)


def _zeros(shape: tuple[int, ...], dtype: str) -> TensorRef:
    import torch

    kind = getattr(torch, DTYPES[dtype].torch)
    return TensorRef("", shape, dtype, LazySource(lambda: torch.zeros(shape, dtype=kind)))


def _module(kept: Extracted) -> ExtractedModule:
    stored, full = kept.stored, kept.full is not None
    rank = None if full else kept.rank
    return ExtractedModule(
        str(stored.target),
        stored.target.component,
        "full" if full else "lora",
        stored.shape,
        rank,
        norm=0.0,
        energy=0.0,
        error=0.0,
        optimum=0.0,
        method="",
    )
