"""The arithmetic of an extraction on one tensor: subtract, decompose, store."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from loratools.errors import NonFiniteError
from loratools.maths.rank import Rule
from loratools.maths.svd import Decomposed, decompose
from loratools.ops._changes import Piece
from loratools.ops._extract_difference import difference, distance
from loratools.tensors import DTYPES

Shape = tuple[int, ...]

FACTORS, FULL, NORM = "factors", "full", "norm"


class Job(NamedTuple):
    """One tensor to be compared: plain values, so that it can be done anywhere.

    Attributes:
        number: Its place among all jobs.
        name: Its key in the base, for messages.
        base: The tensor of the base.
        tuned: The tensors that hold its rows in the tuned checkpoint.
        shape: Of the base's weight, (out, in[, kh, kw]), or (vocabulary, dim) of an embedding.
        rows: How many of its rows are compared; the difference of the others is 0.
        task: "factors", "full" (the difference itself), or "norm" (only how large it is).
        rule: Of the rank.
        method: "auto", "exact" or "randomized".
        tolerance: See ``decompose``.
        seed: Of random starts.
        store: The store dtype of what is returned, a safetensors name.
    """

    number: int
    name: str
    base: Piece
    tuned: tuple[Piece, ...]
    shape: Shape
    rows: int
    task: str = NORM
    rule: Rule | None = None
    method: str = "auto"
    tolerance: float = 1e-3
    seed: int = 0
    store: str = "F32"

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of the difference with its kernel flattened."""
        return self.shape[0], math.prod(self.shape[1:])


class Found(NamedTuple):
    """What became of one job.

    Attributes:
        number: Its job's.
        norm: ‖difference‖, Frobenius; 0 where the tensors do not differ.
        up: (rank, out): U·√σ, transposed, so that its first rows are a smaller rank's.
        down: (rank, in·kh·kw): √σ·Vᵀ.
        full: The difference itself.
        sigma: The singular values that are kept, descending.
        lost: ‖difference − extracted‖².
        gap: How much of that a matrix of this rank may capture at best.
        method: "exact", "randomized" or "full".
        tiny: Whether the factors lie below the store dtype's normal numbers.
    """

    number: int
    norm: float = 0.0
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    full: torch.Tensor | None = None
    sigma: tuple[float, ...] = ()
    lost: float = 0.0
    gap: float = 0.0
    method: str = "full"
    tiny: bool = False

    @property
    def energy(self) -> float:
        """‖difference‖²."""
        return self.norm * self.norm


def extract_tensor(job: Job) -> Found:
    """Everything that is to be done for one job, on the CPU.

    Raises:
        NonFiniteError: NaN or Inf in one of the checkpoints; file and key are named.
    """
    if job.task == NORM:
        return Found(job.number, distance(job))
    # What is returned whole must be its own.
    found = difference(job, reuse=job.task != FULL)
    if found is None:
        return Found(job.number)
    matrix, norm, noise = found
    if not norm:
        return Found(job.number, norm)
    if job.task == FULL:
        full = stored(matrix, job.store, job.name).reshape(job.shape)
        return Found(job.number, norm, full=full)
    rule = job.rule or Rule("rank", 1)
    decomposed = decompose(
        matrix,
        rule,
        method=job.method,
        tolerance=job.tolerance,
        seed=job.seed,
        noise=noise,
        energy=norm * norm,
    )
    return factored(job, decomposed)


def factored(job: Job, found: Decomposed) -> Found:
    """Balanced factors, √σ on both sides, in the store dtype on the CPU."""
    norm = math.sqrt(found.energy)
    if not len(found.sigma):
        return Found(job.number)
    root = found.sigma.to(found.u.device).sqrt().to(found.u.dtype)
    up, down = found.u.t() * root[:, None], root[:, None] * found.vh
    largest = math.sqrt(float(found.sigma[0]) / max(job.matrix))
    return Found(
        job.number,
        norm,
        stored(up, job.store, job.name),
        stored(down, job.store, job.name),
        sigma=tuple(found.sigma.tolist()),
        lost=found.lost,
        gap=found.gap,
        method=found.method,
        tiny=largest < torch.finfo(getattr(torch, DTYPES[job.store].torch)).tiny,
    )


def stored(values: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """Values in a store dtype, contiguous on the CPU.

    Raises:
        NonFiniteError: Some do not fit.
    """
    rounded = values.to(getattr(torch, DTYPES[dtype].torch)).contiguous().cpu()
    if not torch.isfinite(rounded).all():
        raise NonFiniteError(
            f"values up to {float(values.abs().max()):.3g} do not fit {dtype}",
            keys=[name],
            todo="Choose --dtype float32 or bfloat16",
        )
    return rounded
