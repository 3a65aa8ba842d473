"""Jobs on an accelerator: matrices of one shape are decomposed together while the next ones are read.

Threads read and subtract, put the result into pinned memory and copy it on a stream of their own; the calling thread
waits for the copies of one batch, which by then are done, and decomposes it. What comes back does not depend on which
matrices share a batch, but for rounding. Where the accelerator's memory is too small, perhaps because others use it, a
batch is divided, and a single matrix left to the CPU. Without an accelerator the same code runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from loratools.engine import local
from loratools.maths.rank import Rule
from loratools.maths.svd import decompose_batch
from loratools.ops._extract_difference import Difference, difference
from loratools.ops._extract_tensor import FACTORS, Found, Job, extract_tensor, factored

# Of float32 matrices in one batch; and how many.
_BATCH_BYTES = 1 << 28
# Of float32 matrices that are read ahead, in the host's memory; a larger one is read alone.
_HOST_BYTES = 1 << 30
_BATCH = 32
# A few matrices wait for each: enough to keep the accelerator busy, few enough for the host's memory.
_READERS = 2


class _Sent(NamedTuple):
    """A matrix on its way to the accelerator.

    Attributes:
        job: Its job.
        matrix: On the device; None where ``found`` is all there is.
        found: The result of a job without a matrix to decompose.
        arrived: An event after the copy, or None where there was none to wait for.
        pinned: What is copied, kept until it has arrived.
        norm: See ``Difference``.
        noise: Likewise.
    """

    job: Job
    matrix: torch.Tensor | None = None
    found: Found | None = None
    arrived: torch.cuda.Event | None = None
    pinned: torch.Tensor | None = None
    norm: float = 0.0
    noise: float = 0.0


def run(jobs: Iterable[Job], device: str, *, batch: int = _BATCH) -> Iterator[Found]:
    """The results of all jobs, in no order: they carry their numbers.

    Args:
        jobs: Of any task.
        device: "cuda", "cuda:N", "mps", or "cpu".
        batch: How many matrices are decomposed together at most, a count.

    Raises:
        NonFiniteError: NaN or Inf in one of the checkpoints.
    """
    on_cuda = device.startswith("cuda")
    stream = torch.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]

    def read(job: Job) -> _Sent:
        if job.task != FACTORS:
            return _Sent(job, found=extract_tensor(job))
        matrix = difference(job)
        if matrix is None:
            return _Sent(job, found=Found(job.number))
        try:
            return _send(job, matrix, device, stream)
        except torch.cuda.OutOfMemoryError:
            return _Sent(job, found=extract_tensor(job))

    waiting: list[_Sent] = []
    ordered = sorted(jobs, key=_shape)
    for sent in local.run(read, ordered, threads=_READERS, size=_bytes, most=_HOST_BYTES):
        if sent.found is not None:
            yield sent.found
            continue
        if waiting and not _fits(waiting, sent, batch):
            yield from _decomposed(waiting)
            waiting = []
        waiting.append(sent)
    yield from _decomposed(waiting)


def _shape(job: Job) -> tuple[tuple[int, int], str, int]:
    """Matrices of one shape and one rule follow each other."""
    return job.matrix, repr(job.rule), job.number


def _bytes(job: Job) -> int:
    """Of the difference."""
    return 4 * job.matrix[0] * job.matrix[1]


def _send(job: Job, found: Difference, device: str, stream: torch.cuda.Stream | None) -> _Sent:
    if stream is None:
        return _Sent(job, found.matrix.to(device), norm=found.norm, noise=found.noise)
    try:
        pinned = found.matrix.pin_memory()
    except RuntimeError:
        pinned = found.matrix  # the system pins no more: the copy waits instead
    with torch.cuda.stream(stream):
        there = pinned.to(device, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(stream)
    return _Sent(job, there, None, arrived, pinned, found.norm, found.noise)


def _fits(waiting: Sequence[_Sent], sent: _Sent, batch: int) -> bool:
    first = waiting[0].job
    size = (len(waiting) + 1) * _bytes(first)
    alike = (first.matrix, first.rule) == (sent.job.matrix, sent.job.rule)
    return alike and len(waiting) < batch and size <= _BATCH_BYTES


def _decomposed(batch: Sequence[_Sent]) -> list[Found]:
    try:
        return _together(batch)
    except torch.cuda.OutOfMemoryError:
        pass  # what was computed is let go of before the next try
    if len(batch) == 1:
        return [extract_tensor(batch[0].job)]
    half = len(batch) // 2
    return [*_decomposed(batch[:half]), *_decomposed(batch[half:])]


def _together(batch: Sequence[_Sent]) -> list[Found]:
    matrices = []
    for sent in batch:
        if sent.matrix is None:  # of a job without one, which is in no batch
            continue
        if sent.arrived is not None:
            present = torch.cuda.current_stream(sent.matrix.device)
            present.wait_event(sent.arrived)
            # Its memory must not be given to the copying stream before this one is done with it.
            sent.matrix.record_stream(present)
        matrices.append(sent.matrix)
    if not matrices:
        return []
    job = batch[0].job
    found = decompose_batch(
        torch.stack(matrices),
        job.rule or Rule("rank", 1),
        method=job.method,
        tolerance=job.tolerance,
        seed=job.seed,
        noise=[sent.noise for sent in batch],
        energies=[sent.norm * sent.norm for sent in batch],
    )
    return [factored(sent.job, each) for sent, each in zip(batch, found, strict=True)]
