"""One module of a resize: its ΔW as factors, cut to a rank, and stored with its scale in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from loratools.errors import NonFiniteError
from loratools.kinds import lora
from loratools.maths.lowrank import COMPUTE, Compressed, Factors, compress, numerical_rank
from loratools.maths.rank import Float64
from loratools.model import Module
from loratools.ops import _combine
from loratools.ops._device import on
from loratools.ops._resize_store import BIASES, Form, padded, rounding, scaled, stays, stored
from loratools.ops.as_lora import to_lora
from loratools.tensors import DTYPES, TensorRef


class Spectrum(NamedTuple):
    """The singular values of a module's ΔW, scale included.

    Attributes:
        sigma: Those above rounding noise, descending; none for a zero ΔW. (real,) float64.
        total: Σσ² of all there are, known or not.
        shape: Of the weight: (out, in[, kh, kw]).
    """

    sigma: Float64
    total: float
    shape: tuple[int, ...]


class Resized(NamedTuple):
    """What became of one module.

    Attributes:
        module: The result; the input's own where nothing had to change.
        spectrum: Of the input's ΔW.
        energy: The fraction of Σσ² that is kept.
        error: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F of what is stored.
        note: What the caller should know, or empty.
    """

    module: Module
    spectrum: Spectrum
    energy: float
    error: float
    note: str = ""


class _Source(NamedTuple):
    """A module as LoRA.

    Attributes:
        module: Of kind "lora"; of the input's own tensors where it was one.
        factors: Its product, scale excluded, float64.
        share: The fraction of ΔW's Σσ² that they hold.
    """

    module: Module
    factors: Factors
    share: float


def has_kernel(module: Module) -> bool:
    """Whether it is a convolution with a kernel of more than one; a 1x1 convolution counts as linear."""
    return any(size > 1 for size in (module.shape or ())[2:])


def nonfinite(module: Module) -> list[str]:
    """The keys of the tensors that hold NaN or Inf, and the scale where it is not finite."""
    found = [] if math.isfinite(module.scale) else [f"the scale of {module.target}"]
    return found + [
        ref.name or f"{module.target}.{role}" for role, ref in module.tensors() if not _finite(ref)
    ]


def _finite(ref: TensorRef) -> bool:
    if not DTYPES[ref.dtype].floating:
        return True
    values = ref.load()
    return bool((values.float() if values.itemsize == 1 else values).isfinite().all())


def spectrum(module: Module, base: torch.Tensor | None, limit: int | None, place: str) -> Spectrum:
    """The singular values of a module's ΔW.

    Args:
        module: Of any kind that can be turned into LoRA.
        base: The weight it changes, where its kind needs it.
        limit: No more of them than this have to be known, a count; None for all.
        place: The device to compute on.
    """
    source = _source(module, base, limit, place)
    return _spectrum(source, compress(source.factors), None)


def resized(
    module: Module,
    base: torch.Tensor | None,
    limit: int | None,
    form: Form,
    choose: Callable[[Spectrum], int],
) -> Resized:
    """A module cut to a rank.

    Args:
        module: Of any kind that can be turned into LoRA.
        base: The weight it changes, where its kind needs it.
        limit: The largest rank it may be given, a count; None for no limit.
        form: How it is stored.
        choose: Its rank for its spectrum; cut to what ΔW has, and at least 1.

    Raises:
        NonFiniteError: A factor holds NaN or Inf, or the result does not fit the store dtype.
        UnsupportedKindError: It cannot be turned into LoRA.
    """
    source = _source(module, base, limit, form.place)
    whole = compress(source.factors, limit)
    known = _spectrum(source, whole, limit)
    rank = max(1, min(choose(known), whole.factors.rank))
    energy, truncation = _kept(known, whole, source, rank)
    wanted = form.rank or rank
    if stays(module, wanted, form) and rank == min(wanted, whole.factors.rank):
        return Resized(module, known, 1.0, 0.0)
    cut = Factors(whole.factors.up[:, :rank], whole.factors.down[:rank])
    exact = scaled(padded(cut, wanted), source.module.scale / form.scale(wanted))
    result = stored(source.module, exact, form, form.store(module))
    lost = rounding(exact, result, math.sqrt(known.total))
    note = _combine.underflow(result, exact)
    if not known.total:
        note = f"{module.target} is zero throughout, and was written as rank {wanted}"
    return Resized(result, known, energy, math.hypot(truncation, lost), note)


def _source(module: Module, base: torch.Tensor | None, limit: int | None, place: str) -> _Source:
    vectors = [module.factors[role] for role in BIASES if role in module.factors]
    if not (math.isfinite(module.scale) and all(_finite(ref) for ref in vectors)):
        raise NonFiniteError(f"{module.target} holds NaN or Inf")
    if lora.is_product(module):
        up, down = lora.matrices(module)
        return _Source(module, Factors(up.to(place), down.to(place)), 1.0)
    with torch.device(place):
        weight = base.to(place) if base is not None else None
        found = to_lora(on(module, place), rank=limit, base=weight, dtype="F64")
        up, down = lora.matrices(found.module)
    return _Source(found.module, Factors(up, down), 1.0 if found.exact else 1.0 - found.error**2)


def _spectrum(source: _Source, whole: Compressed, limit: int | None) -> Spectrum:
    sigma = abs(source.module.scale) * whole.sigma.cpu().numpy()
    total = float(np.sum(np.square(sigma)))
    shape = source.module.shape or source.factors.shape
    if not total:
        return Spectrum(sigma[:0], 0.0, shape)
    real = whole.factors.rank
    if real == limit:
        # It was cut, but all are known; those that are rounding noise are no directions.
        real = numerical_rank(whole.sigma, source.factors.shape, COMPUTE)
    return Spectrum(sigma[:real], total / source.share if source.share else total, shape)


def _kept(known: Spectrum, whole: Compressed, source: _Source, rank: int) -> tuple[float, float]:
    """The fraction of Σσ² that a rank keeps, and the relative error of what it leaves out."""
    if not known.total:
        return 1.0, 0.0
    # Added up from the smallest, so that little that is lost keeps its digits.
    tail = float(np.sum(np.square(known.sigma[rank:])[::-1]))
    lost = tail / known.total + (1.0 - source.share)
    exact = source.share == 1.0 and rank == whole.factors.rank >= known.sigma.size
    return (1.0, 0.0) if exact else (max(0.0, 1.0 - lost), math.sqrt(lost))
