"""What an extraction would find and how long it would take, from decomposing a few of its matrices."""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from loratools.engine import local
from loratools.ops import _extract_run
from loratools.ops._extract_jobs import Work, job_bytes
from loratools.ops._extract_modules import Kept
from loratools.ops._extract_report import blank
from loratools.ops._extract_tensor import FACTORS, FULL, Found, Job, extract_tensor
from loratools.ops.checkpoint_results import ExtractedModule, ExtractReport
from loratools.tensors import DTYPES, LazySource, TensorRef

if TYPE_CHECKING:
    from loratools.ops._extract_run import Extraction

# Shapes that are tried, those first that make up most of the work.
_SAMPLES = 4


class _Sample(NamedTuple):
    """One matrix that was tried.

    Attributes:
        seconds: How long it took, reading included.
        rank: What the rule gave, a count; 0 where the matrix did not change.
        bytes: How many were read for it.
    """

    seconds: float
    rank: int
    bytes: int


def report(planned: Extraction) -> ExtractReport:
    """What would be written and how long it would take, were all weights changed as the sampled ones are.

    The modules have no norms: their differences were not computed.
    """
    groups: dict[tuple[int, int], list[Job]] = {}
    for job in planned.work.jobs:
        if job.task == FACTORS:
            groups.setdefault(job.matrix, []).append(job)
    heavy = sorted(groups.values(), key=lambda jobs: -len(jobs) * _effort(jobs[0]))[:_SAMPLES]
    sampled = {jobs[0].matrix: _tried(_affordable(planned, jobs[0])) for jobs in heavy}
    ranks = _ranks(planned, sampled)
    kept = placeholders(planned.work, ranks)
    size = _extract_run.size_of(planned, kept) if kept else 0
    if planned.options.kind == "size":
        size = min(size, int(planned.options.value))
    return blank(planned)._replace(
        modules=tuple(_module(each) for each in kept),
        bytes=size,
        energy=0.0,
        estimate=_seconds(planned, sampled),
    )


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


def _tried(job: Job) -> _Sample:
    started = time.monotonic()
    found = extract_tensor(job)
    return _Sample(time.monotonic() - started, len(found.sigma), job_bytes(job))


def _ranks(planned: Extraction, sampled: dict[tuple[int, int], _Sample]) -> dict[int, int]:
    """The rank of each module: its own shape's, or what the sampled shapes have in the middle."""
    changed = [each.rank for each in sampled.values() if each.rank]
    usual = int(median(changed)) if changed else 1
    found: dict[int, int] = {}
    for job in planned.work.jobs:
        if job.task == FACTORS:
            like = sampled.get(job.matrix)
            rank = like.rank if like is not None and like.rank else usual
            found[job.number] = max(1, min(rank, *job.matrix))
    return found


def _seconds(planned: Extraction, sampled: dict[tuple[int, int], _Sample]) -> float:
    """By shape where it was tried; of other shapes by the sampled seconds per byte."""
    known, rest = 0.0, 0
    for job in planned.work.jobs:
        like = sampled.get(job.matrix) if job.task == FACTORS else None
        known += like.seconds if like is not None else 0.0
        rest += job_bytes(job) if like is None else 0
    read = sum(each.bytes for each in sampled.values())
    rate = sum(each.seconds for each in sampled.values()) / read if read else 0.0
    threads = planned.threads or local.default_threads()
    return (known + rest * rate) / threads


def placeholders(work: Work, ranks: dict[int, int] | None = None) -> list[Kept]:
    """Results as they would be, with zeros for data; of rank 1 unless told otherwise."""
    return list(_placeholders(work, ranks or {}))


def _placeholders(work: Work, ranks: dict[int, int]) -> Iterable[Kept]:
    for job in work.jobs:
        stored = work.pairs[job.number].stored
        if job.task == FULL:
            yield Kept(stored, Found(job.number), full=_zeros(stored.shape, job.store))
        elif job.task == FACTORS:
            rank = ranks.get(job.number, 1)
            found = Found(job.number, sigma=(0.0,) * rank)
            up, down = (_zeros((rank, side), job.store) for side in job.matrix)
            yield Kept(stored, found, up, down)


def _zeros(shape: tuple[int, ...], dtype: str) -> TensorRef:
    import torch

    kind = getattr(torch, DTYPES[dtype].torch)
    return TensorRef("", shape, dtype, LazySource(lambda: torch.zeros(shape, dtype=kind)))


def _module(kept: Kept) -> ExtractedModule:
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
