"""What adapters make of one tensor of a base model: a pure function of plain data, to be run anywhere.

The tensor is read, changed and rounded some rows at a time, so that little more than the tensor itself is held; ΔW of
low-rank adapters is never built. Only compensated rounding and float8 scales need the whole in the compute dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from loratools.errors import NonFiniteError, OptionError
from loratools.io import base as io_base
from loratools.io._load import Room
from loratools.maths import float8, rounding
from loratools.ops._assemble import outputs_first, resized
from loratools.ops._bake_finite import refuse
from loratools.ops._bake_job import BakedData, BakeJob, Exact
from loratools.ops._bake_measure import Fidelity, basis, norm_of, placed, sample, within
from loratools.ops._bake_steps import ELEMENTS, Block
from loratools.ops._bake_terms import Compiled, Compiler
from loratools.ops._changes import Change
from loratools.ops._device import has_float64
from loratools.ops.checkpoint_results import BakedTensor
from loratools.tensors import DTYPES

__all__ = ["BakeJob", "BakedData", "Exact", "bake_tensor", "exact_rows"]

ROUNDINGS = ("nearest", "stochastic", "compensated")


class _Work(NamedTuple):
    """A job with its tensor.

    Attributes:
        job: The job.
        stored: The tensor as stored, or dequantised where it has scales.
        scale: Its float8 scales, or None.
        turned: Whether it is stored as (in, out).
        dtype: The store dtype.
        compute: float32 or float64.
        compiled: The steps.
    """

    job: BakeJob
    stored: torch.Tensor
    scale: torch.Tensor | None
    turned: bool
    dtype: torch.dtype
    compute: torch.dtype
    compiled: Compiled

    @property
    def source(self) -> torch.Tensor:
        """The tensor, outputs first; a single number as a vector."""
        return outputs_first(self.stored, self.turned)

    @property
    def store(self) -> str:
        """The safetensors name of the store dtype."""
        return self.job.dtype or self.job.change.weight.dtype

    @property
    def requantised(self) -> bool:
        """Whether the result has float8 scales."""
        return self.scale is not None and self.store == self.job.change.weight.dtype


def bake_tensor(job: BakeJob, room: Room | None = None) -> BakedData:
    """One tensor of the base with all that adapters do to it, in the order of the adapters.

    Args:
        job: What to do. All terms of a module say the same of ``turned``.
        room: Memory that the result may lie in, until the same thread bakes another tensor there.

    Returns:
        The tensor as it is to be stored, and how much of ΔW it holds. ``kept`` and ``error`` of large tensors that
        low-rank factors change are measured on evenly spaced rows, unless computed in float64 or rounded with
        compensation; ``norm`` is always that of the whole.

    Raises:
        NonFiniteError: The base or the result holds NaN or infinity, or is beyond the store dtype's range.
        ShapeError: A module does not fit the tensor.
        UnsupportedKindError: A module cannot be computed.
        OptionError: No such rounding.
    """
    if job.rounding not in ROUNDINGS:
        raise OptionError(f"rounding {job.rounding!r}", candidates=ROUNDINGS)
    work = _prepared(job, room)
    if work.requantised or (job.rounding == "compensated" and work.compiled.products):
        return _as_a_whole(work)
    return _by_rows(work)


def exact_rows(change: Change, *, precise: bool = True, room: Room | None = None) -> Exact:
    """One tensor of the base with all that adapters do to it, before it is rounded, some rows at a time.

    Args:
        change: Which tensor, and what is done to it.
        precise: In float64 instead of float32.
        room: Memory that the base's tensor may lie in, until the same thread asks for another.

    Raises:
        LoraError: As :func:`bake_tensor`, now or while the rows are taken.
    """
    work = _prepared(BakeJob(change, precise=precise, dtype="F64" if precise else "F32"), room)
    blocks = ((block.start, block.stop, block.current) for block in _blocks(work, work.compute))
    return Exact(tuple(work.stored.shape), work.turned, blocks, work.stored)


def _prepared(job: BakeJob, room: Room | None = None) -> _Work:
    change = job.change
    stored, scale = io_base.load(change.weight, room), None
    store: torch.dtype = getattr(torch, DTYPES[job.dtype or change.weight.dtype].torch)
    compute = torch.float64 if job.precise or torch.float64 in (stored.dtype, store) else torch.float32
    if compute == torch.float64 and not has_float64(job.device):
        job = job._replace(device="cpu")
    if change.scale is not None:
        scale = io_base.load(change.scale)
        stored = float8.dequantise(stored, scale, compute)
    turned = any(term.turned for term in change.terms)
    replaced = [term.tensor.shape for term in change.terms if term.role == "replace" and term.tensor]
    stored = resized(stored, replaced[-1]) if replaced else stored
    compiled = Compiler(change, outputs_first(stored, turned), turned, compute, job.device).all()
    return _Work(job, stored, scale, turned, store, compute, compiled)


def _by_rows(work: _Work) -> BakedData:
    """Rows read, changed, rounded and stored, one block after the other."""
    compiled, stored = work.compiled, work.stored
    # The tensor itself takes the result where no later row needs what was there.
    inside = stored.dtype == work.dtype and not compiled.reads_base
    data = stored if inside else torch.empty(stored.shape, dtype=work.dtype)
    rows = _measured_rows(work)
    fidelity = _computed(work, data, work.dtype, rows)
    if rows is not None and fidelity.kept is None and norm_of(compiled.products, len(work.source)):
        # None of the sampled rows changes.
        work = _prepared(work.job)
        data = torch.empty(
            stored.shape, dtype=work.dtype
        )  # the sampled pass may have written into the tensor
        rows, fidelity = None, _computed(work, data, work.dtype, None)
    norm = fidelity.norm if rows is None else norm_of(compiled.products, len(work.source))
    note = "no low-rank change: rounded to nearest" if work.job.rounding == "compensated" else ""
    return _baked(work, data.contiguous(), None, fidelity, norm, rows is not None, note)


def _measured_rows(work: _Work) -> list[int] | None:
    """Which rows to measure; None for all."""
    exact = work.compute == torch.float64 or not work.compiled.low_rank
    # A byte per value leaves too few neighbours for a sample's rows to stand for the others', and cannot be indexed.
    if exact or work.stored.dtype.itemsize == 1 or work.dtype.itemsize == 1:
        return None
    return sample(work.compiled.products, len(work.source), work.source[:1].numel())


def _computed(work: _Work, data: torch.Tensor, dtype: torch.dtype, rows: list[int] | None) -> Fidelity:
    """Fill ``data`` with the result, rounded to its dtype; what fits ``dtype`` is not refused."""
    source, target = work.source, outputs_first(data, work.turned)
    fidelity = Fidelity()
    generator = _generator(work.job)
    for block in _blocks(work, dtype):
        start, stop, current = block.start, block.stop, block.current
        picked = within(rows, start, stop)
        # Before anything is stored: the source may be what is written to.
        before = block.base if picked is None else source[start:stop][picked].to(work.compute)
        after = current.cpu()
        if work.job.rounding == "stochastic" and data.dtype == work.dtype:
            target[start:stop] = _stochastic(work, block, after, generator)
        else:
            target[start:stop] = after
        stored = target[start:stop]
        if picked is None:
            fidelity.add(before.cpu(), after, stored)
        elif picked:
            fidelity.add(before, after[picked], stored[picked])
    return fidelity


def _blocks(work: _Work, dtype: torch.dtype) -> Iterator[Block]:
    """The rows with all changes, some at a time; each lasts until the next. What fits ``dtype`` is not refused."""
    source = work.source
    step = max(1, ELEMENTS // max(1, source[:1].numel()))
    buffer = torch.empty_like(source[:step], dtype=work.compute, device=work.job.device)
    for start in range(0, len(source), step):
        stop = min(start + step, len(source))
        block = Block(start, stop, buffer[: stop - start].copy_(source[start:stop]), source)
        for each in work.compiled.steps:
            each.apply(block)
        if not rounding.fits(block.current, dtype):
            refuse(work.job.change, block, work.store)
        yield block


def _stochastic(work: _Work, block: Block, values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    try:
        return rounding.stochastic(values, work.dtype, generator)
    except NonFiniteError:
        refuse(work.job.change, block, work.store)


def _generator(job: BakeJob) -> torch.Generator:
    """Random numbers that depend on the seed and the tensor's key alone."""
    digest = hashlib.blake2b(f"{job.seed}:{job.change.weight.key}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _as_a_whole(work: _Work) -> BakedData:
    """The whole result in the compute dtype, then rounded."""
    wide = torch.empty(work.stored.shape, dtype=work.compute)
    # Scales can grow: with them only what is not finite is refused.
    _computed(work, wide, work.compute if work.requantised else work.dtype, None)
    notes: list[str] = []
    scale = None
    if work.requantised and work.scale is not None:
        quantised = float8.quantise(wide, work.scale, work.dtype, _rounding(work, wide, notes))
        data, values = quantised.data, float8.dequantise(quantised.data, quantised.scale, work.compute)
        if quantised.grown:
            scale = quantised.scale
            notes.append(
                f"{quantised.grown} of {scale.numel()} float8 scales grew, by up to {quantised.most:.3g} x"
            )
    else:
        data = values = _compensated(work, wide, None, notes)
    fidelity = Fidelity()
    step = max(1, ELEMENTS // max(1, wide[:1].numel()))
    for start in range(0, len(wide), step):
        rows = slice(start, start + step)
        fidelity.add(work.stored[rows].to(work.compute), wide[rows], values[rows])
    return _baked(work, data, scale, fidelity, fidelity.norm, False, "; ".join(notes))


def _rounding(work: _Work, wide: torch.Tensor, notes: list[str]) -> float8.Rounding | None:
    """How to round values that float8 scales have divided."""
    if work.job.rounding == "stochastic":
        generator = _generator(work.job)
        return lambda divided, dtype, _: rounding.stochastic(divided, dtype, generator)
    if work.job.rounding == "compensated" and work.compiled.products:
        return lambda _, __, scale: _compensated(work, wide, scale, notes)
    if work.job.rounding == "compensated":
        notes.append("no low-rank change: rounded to nearest")
    return None


def _compensated(
    work: _Work, wide: torch.Tensor, scale: torch.Tensor | None, notes: list[str]
) -> torch.Tensor:
    """The result rounded with compensation in the subspace of all products, in its stored shape."""
    if not work.compiled.low_rank:
        notes.append("compensated for its low-rank changes alone")
    up, down = placed(work.compiled.products, len(work.source))
    bases = basis(up, work.compute), basis(down.T, work.compute)
    left, right = reversed(bases) if work.turned else bases
    matrix = wide.flatten(1)
    spread = None if scale is None else float8.spread(scale, wide.shape)
    if spread is not None and spread.dim() > 1:
        spread = spread.flatten(1)
    return rounding.compensated(matrix, work.dtype, left, right, scale=spread).data.reshape(wide.shape)


def _baked(
    work: _Work,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    fidelity: Fidelity,
    norm: float,
    sampled: bool,
    note: str,
) -> BakedData:
    change = work.job.change
    result = BakedTensor(
        change.weight.key,
        change.target,
        change.component,
        tuple(data.shape),
        work.store,
        tuple(sorted({term.adapter for term in change.terms})),
        norm,
        fidelity.kept,
        fidelity.error,
        sampled,
        note,
    )
    return BakedData(change.weight.key, data, scale, result)
