"""Which tensors are decomposed, which are taken whole, and which are only measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loratools.io.base import Weight
from loratools.ops._extract_options import Options
from loratools.ops._extract_pairs import BARE, EMBEDDING, NORM, Pair, Stored
from loratools.ops._extract_plan import Compared
from loratools.ops._extract_tensor import FACTORS, FULL, Job
from loratools.ops._extract_tensor import NORM as MEASURE

# What is kept of a base in another dtype: float8 has too few digits for factors, float64 more than anybody trains.
_STORED_AS = {"F16": "F16", "BF16": "BF16", "F32": "F32", "F64": "F32"}
_OTHERWISE = "BF16"


class Work(NamedTuple):
    """All that is to be done.

    Attributes:
        jobs: One for each pair, numbered in the base's order.
        pairs: By job number.
        why: By job number, why a tensor is not taken although it may differ.
        replaced: Numbers of the jobs whose tuned tensor is taken whole instead of a difference, where it differs.
        dtype: The store dtype, a safetensors name.
    """

    jobs: tuple[Job, ...]
    pairs: Mapping[int, Pair]
    why: Mapping[int, str]
    replaced: frozenset[int]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes that are read of both checkpoints."""
        return sum(job_bytes(job) for job in self.jobs)


def work(compared: Compared, options: Options, *, replaces: bool) -> Work:
    """The jobs of an extraction.

    Args:
        compared: The pairs.
        options: What is asked for.
        replaces: Whether the layout holds whole tensors that take the place of the base's.
    """
    dtype = options.dtype or _common([pair.stored for pair in compared.pairs])
    jobs: list[Job] = []
    why: dict[int, str] = {}
    replaced: set[int] = set()
    for number, pair in enumerate(compared.pairs):
        task, reason = _task(pair.stored, options)
        if replaces and _goes_whole(pair, options):
            task = MEASURE
            replaced.add(number)
        elif reason:
            why[number] = reason
        jobs.append(_job(number, pair, task, options, dtype))
    return Work(tuple(jobs), dict(enumerate(compared.pairs)), why, frozenset(replaced), dtype)


def _goes_whole(pair: Pair, options: Options) -> bool:
    """Whether a layout that holds whole tensors gets the tuned one: a grown vocabulary, a norm or a bias, on request.

    PEFT's other way for biases (``lora_bias``) is for all modules or none: it cannot be merged where one of them has
    no bias, nor loaded beside an embedding.
    """
    if pair.stored.role == NORM or pair.stored.leaf == "bias":
        return options.full_small
    return bool(pair.grown) and options.embeddings and not pair.stored.is_small


def _task(stored: Stored, options: Options) -> tuple[str, str]:
    """What is done with a tensor, and why it is not taken where it is only measured."""
    if stored.is_small:
        what = "a bias" if stored.leaf == "bias" else _SMALL.get(stored.role, "a vector")
        return (FULL, "") if options.full_small else (MEASURE, f"{what}; --full-small takes it along")
    if stored.role == EMBEDDING:
        return (FACTORS, "") if options.embeddings else (MEASURE, "an embedding; --embeddings takes it along")
    if is_wide(stored) and options.conv_rank == 0:
        return MEASURE, "a convolution with a kernel; --conv-rank is 0"
    return FACTORS, ""


_SMALL = {NORM: "a norm", BARE: "a parameter of its own"}


def is_wide(stored: Stored) -> bool:
    """Whether it is a convolution with a kernel of more than one."""
    return math.prod(stored.shape[2:]) > 1


def _job(number: int, pair: Pair, task: str, options: Options, dtype: str) -> Job:
    stored = pair.stored
    return Job(
        number,
        stored.weight.key,
        stored.whole,
        pair.tuned,
        stored.shape or (1,),
        pair.rows,
        task,
        options.rule(wide=is_wide(stored)) if task == FACTORS else None,
        options.svd,
        options.tolerance,
        options.seed,
        dtype,
    )


def job_bytes(job: Job) -> int:
    """Bytes that a job reads."""
    return job.base.weight.nbytes + sum(_share(piece.weight, piece.spans) for piece in job.tuned)


def _share(weight: Weight, spans: Sequence[tuple[int, int, int]]) -> int:
    rows = sum(stop - start for start, stop, _ in spans)
    return weight.nbytes * rows // max(1, weight.shape[0] if weight.shape else 1)


def _common(stored: Sequence[Stored]) -> str:
    """The dtype that most of the matrices' elements are stored in, as far as factors are stored in it."""
    counts: Counter[str] = Counter()
    for each in stored:
        counts[_STORED_AS.get(each.weight.dtype, _OTHERWISE)] += 0 if each.is_small else math.prod(each.shape)
    return max(counts, key=lambda name: counts[name], default="F32")
