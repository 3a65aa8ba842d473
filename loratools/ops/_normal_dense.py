"""Modules as LoRA at no more rank than their ΔW is worth: DoRA's has as many directions as the base's weight."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from loratools import kinds
from loratools.io.base import Base
from loratools.model import Adapter, Module, Target
from loratools.ops import _as_kind
from loratools.ops.results import Conversion
from loratools.tensors import TensorRef, from_torch

KEPT = 0.999
"""The energy that is kept of what has no exact LoRA where no rank was asked for, a fraction of Σσ²."""


def as_lora(
    adapter: Adapter, *, rank: int | None, base: Base | None, dtype: str, device: str
) -> tuple[Adapter, dict[Target, Module], list[Conversion]]:
    """The adapter with every module turned into LoRA.

    Kinds that are products of factors stay exact where no rank is given. Those whose ΔW is that of a whole weight
    (DoRA, OFT, (IA)³) get the least rank that keeps ``KEPT`` of the energy.

    Args:
        adapter: Any.
        rank: Of the result, at most, a count; None: as above.
        base: The base model, for kinds that need it.
        dtype: The store dtype, or empty for each module's own.
        device: Where to compute.

    Returns:
        The adapter, its former modules by target, and what was done to each.

    Raises:
        UnsupportedKindError: A module has no ΔW that could be computed, or needs the base; all are named.
    """
    found, before, done = _as_kind.as_lora(adapter, rank=rank, base=base, dtype=dtype or None, device=device)
    if rank is not None:
        return found, before, done
    modules = dict(found.modules)
    told = []
    for (target, module), each in zip(before.items(), done, strict=True):
        if _is_dense(module):
            modules[target], each = _least(modules[target], each)
        told.append(each)
    return replace(found, modules=modules), before, told


def _is_dense(module: Module) -> bool:
    """Whether its ΔW is that of a whole weight, which no factors describe."""
    return module.magnitude is not None or kinds.get(module.kind).needs_base


def _least(module: Module, told: Conversion) -> tuple[Module, Conversion]:
    """A decomposed module at the least rank that keeps enough of its energy, and what that costs."""
    up, down = (module.factors[role].load().double().flatten(1) for role in ("up", "down"))
    # Columns of the left factor are orthogonal, and so are rows of the right one: their norms are the spectrum.
    energy = (up.norm(dim=0) * down.norm(dim=1)).square()
    total = float(energy.sum())
    kept = energy.cumsum(0)
    rank = int((kept < KEPT * total).sum()) + 1 if total else 1
    if rank >= (module.rank or 0):
        return module, told
    lost = max(0.0, 1.0 - float(kept[rank - 1]) / total) if total else 0.0
    factors = {
        **module.factors,
        "up": _cut(module.factors["up"], 1, rank),
        "down": _cut(module.factors["down"], 0, rank),
    }
    shorter = module._replace(factors=factors, rank=rank, alpha=module.scale * rank)
    return shorter, told._replace(rank=rank, error=math.hypot(told.error, math.sqrt(lost)), exact=False)


def _cut(ref: TensorRef, axis: int, rank: int) -> TensorRef:
    values: torch.Tensor = ref.load().narrow(axis, 0, rank).contiguous()
    return from_torch(ref.name, values)
