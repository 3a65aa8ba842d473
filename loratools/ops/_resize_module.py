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
from loratools.maths.spectrum import singular_values
from loratools.model import Module
from loratools.ops._combine_store import underflow
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


class Source(NamedTuple):
    """A module as LoRA.

    Attributes:
        module: Of kind "lora"; of the input's own tensors where it was one.
        factors: Its product, scale excluded.
        share: The fraction of ΔW's Σσ² that they hold.
    """

    module: Module
    factors: Factors
    share: float


class Cut(NamedTuple):
    """A module at its rank, not stored yet.

    Attributes:
        source: What it was.
        known: Its spectrum.
        real: How many directions there were to choose from, a count.
        factors: Those chosen, scale excluded, float64.
    """

    source: Source
    known: Spectrum
    real: int
    factors: Factors


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
    source = source_of(module, base, limit, place)
    return spectrum_of(source, *singular_values(source.factors))


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
    source = source_of(module, base, limit, form.place)
    return finished(module, decided(source, compress(source.factors, limit), limit, choose), form)


def decided(source: Source, whole: Compressed, limit: int | None, choose: Callable[[Spectrum], int]) -> Cut:
    """A module at its rank.

    Args:
        source: What it is as LoRA.
        whole: Its product at the limit.
        limit: As for ``resized``.
        choose: Likewise.
    """
    known = spectrum_of(source, whole.sigma, _real(source, whole, limit))
    rank = max(1, min(choose(known), whole.factors.rank))
    return Cut(
        source, known, whole.factors.rank, Factors(whole.factors.up[:, :rank], whole.factors.down[:rank])
    )


def finished(module: Module, cut: Cut, form: Form) -> Resized:
    """A module as it is stored, and what that cost.

    Args:
        module: The input.
        cut: At its rank.
        form: How it is stored.

    Raises:
        NonFiniteError: The result does not fit the store dtype.
    """
    source, known, rank = cut.source, cut.known, cut.factors.rank
    energy, truncation = _kept(cut)
    wanted = form.rank or rank
    if stays(module, wanted, form) and rank == min(wanted, cut.real):
        return Resized(module, known, 1.0, 0.0)
    exact = scaled(padded(cut.factors, wanted), source.module.scale / form.scale(wanted))
    result = stored(source.module, exact, form, form.store(module))
    lost = rounding(exact, result, math.sqrt(known.total))
    note = underflow(result, exact)
    if not known.total:
        note = f"{module.target} is zero throughout, and was written as rank {wanted}"
    return Resized(result, known, energy, math.hypot(truncation, lost), note)


def source_of(module: Module, base: torch.Tensor | None, limit: int | None, place: str) -> Source:
    """A module as LoRA, in float64.

    Args:
        module: Of any kind that can be turned into LoRA.
        base: The weight it changes, where its kind needs it.
        limit: No rank above this is needed, a count; None for no limit.
        place: The device to compute on.

    Raises:
        NonFiniteError: The scale or a bias holds NaN or Inf.
        UnsupportedKindError: It cannot be turned into LoRA.
    """
    check_beside(module)
    if lora.is_product(module):
        up, down = lora.matrices(module)
        return Source(module, Factors(up.to(place), down.to(place)), 1.0)
    with torch.device(place):
        weight = base.to(place) if base is not None else None
        found = to_lora(on(module, place), rank=limit, base=weight, dtype="F64")
        up, down = lora.matrices(found.module)
    return Source(found.module, Factors(up, down), 1.0 if found.exact else 1.0 - found.error**2)


def check_beside(module: Module) -> None:
    """Refuse what no decomposition finds out.

    Raises:
        NonFiniteError: The scale or a bias holds NaN or Inf.
    """
    vectors = [module.factors[role] for role in BIASES if role in module.factors]
    if not (math.isfinite(module.scale) and all(_finite(ref) for ref in vectors)):
        raise NonFiniteError(f"{module.target} holds NaN or Inf")


def _real(source: Source, whole: Compressed, limit: int | None) -> int:
    """How many singular values are more than rounding noise, a count."""
    if whole.factors.rank != limit:
        return whole.factors.rank
    # It was cut, but all are known; those that are rounding noise are no directions.
    return numerical_rank(whole.sigma, source.factors.shape, COMPUTE)


def spectrum_of(source: Source, values: torch.Tensor, real: int) -> Spectrum:
    """The spectrum of a module.

    Args:
        source: What it is as LoRA.
        values: The singular values of its product, scale excluded, descending.
        real: How many of them are more than rounding noise, a count.
    """
    sigma = abs(source.module.scale) * values.cpu().numpy()
    total = float(np.sum(np.square(sigma)))
    shape = source.module.shape or source.factors.shape
    if not total:
        return Spectrum(sigma[:0], 0.0, shape)
    return Spectrum(sigma[:real], total / source.share if source.share else total, shape)


def _kept(cut: Cut) -> tuple[float, float]:
    """The fraction of Σσ² that a rank keeps, and the relative error of what it leaves out."""
    source, known, rank = cut.source, cut.known, cut.factors.rank
    if not known.total:
        return 1.0, 0.0
    # Added up from the smallest, so that little that is lost keeps its digits.
    tail = float(np.sum(np.square(known.sigma[rank:])[::-1]))
    lost = tail / known.total + (1.0 - source.share)
    exact = source.share == 1.0 and rank == cut.real >= known.sigma.size
    return (1.0, 0.0) if exact else (max(0.0, 1.0 - lost), math.sqrt(lost))
