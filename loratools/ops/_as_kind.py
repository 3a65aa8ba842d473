"""All modules of an adapter turned into LoRA."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import torch

from loratools import kinds
from loratools.errors import UnsupportedKindError
from loratools.io.base import Base
from loratools.kinds import lora
from loratools.model import Adapter, Module, Target
from loratools.ops._base_weights import Weights
from loratools.ops._device import home, on, usable
from loratools.ops._projections import completed
from loratools.ops.as_lora import Converted, to_lora
from loratools.ops.results import Conversion

# Kinds whose factors have a convolution's kernel flattened into its inputs.
_FLATTENED = ("loha", "lokr")
_MATRIX = 2


def as_lora(
    adapter: Adapter, *, rank: int | None, base: Base | None, dtype: str | None, device: str = "auto"
) -> tuple[Adapter, dict[Target, Module], list[Conversion]]:
    """The adapter with every module turned into LoRA.

    Modules of norms or biases alone have no ΔW and stay; a plain LoRA stays unless its rank is more than was asked for.

    Args:
        adapter: Any.
        rank: Of the result, at most, a count; None: as many as ΔW has, which is exact.
        base: The base model, for kinds that need it.
        dtype: The store dtype ("F16", …), or None for each module's own.
        device: Where to compute.

    Returns:
        The adapter, its former modules by target, and what was done to each.

    Raises:
        UnsupportedKindError: A module has no ΔW that could be computed, or needs the base; all are named.
    """
    place = usable(device, wanted=torch.float64)
    modules: dict[Target, Module] = {}
    before: dict[Target, Module] = {}
    done: list[Conversion] = []
    failed: list[tuple[Module, UnsupportedKindError]] = []
    with Weights(base, adapter.arch) if base is not None else nullcontext() as weights:
        for module, whole in zip(adapter.modules.values(), _whole(adapter, weights), strict=True):
            target = module.target
            modules[target] = module
            if _stays(module, rank):
                continue
            try:
                found = _converted(whole, weights, rank, dtype, place)
            except UnsupportedKindError as error:
                failed.append((module, error))
                continue
            if found is not None:
                modules[target] = found.module
                before[target] = module
                kind = "dora" if module.magnitude is not None else module.kind
                done.append(Conversion(str(target), kind, found.module.rank or 0, found.error, found.exact))
    if failed:
        raise UnsupportedKindError(
            f"{len(failed)} of {len(adapter.modules)} modules cannot be turned into LoRA: {failed[0][1].problem}",
            path=adapter.path or None,
            keys=[str(module.target) for module, _ in failed],
            todo=_todo(failed, given=base is not None),
        )
    return replace(adapter, modules=modules), before, done


def _whole(adapter: Adapter, weights: Weights | None) -> list[Module]:
    """The modules with what the file does not store of them, as far as the base tells it."""
    modules = list(adapter.modules.values())
    return modules if weights is None else completed(modules, lambda module: weights.of(module).shape[1])


def _todo(failed: list[tuple[Module, UnsupportedKindError]], *, given: bool) -> str:
    """What helps with modules that could not be converted."""
    module, error = failed[0]
    wants = module.magnitude is not None or kinds.get(module.kind).needs_base
    return "Kinds whose ΔW depends on the base weight need --base" if wants and not given else error.todo


def _stays(module: Module, rank: int | None) -> bool:
    """Whether a module is a plain LoRA already, of at most the rank asked for."""
    plain = lora.is_product(module) and "mid" not in module.factors
    return plain and (rank is None or (module.rank or 0) <= rank)


def _converted(
    module: Module, weights: Weights | None, rank: int | None, dtype: str | None, place: str
) -> Converted | None:
    """A module as LoRA, in the CPU's memory; None where it has no ΔW to convert."""
    needed = module.magnitude is not None or kinds.get(module.kind).needs_base
    weight = weights.of(module) if weights is not None and needed else None
    given = on(module if weights is None else with_kernel(module, weights), place)
    with torch.device(place):
        found = to_lora(given, rank=rank, base=weight.to(place) if weight is not None else None, dtype=dtype)
    if found.module is given:
        return None
    return found if place == "cpu" else found._replace(module=home(found.module))


def with_kernel(module: Module, weights: Weights) -> Module:
    """The module with the kernel that its base weight has, where its own factors hold it flattened."""
    said = module.shape
    if module.kind not in _FLATTENED or said is None or len(said) > _MATRIX:
        return module
    stored = weights.shape_of(module)
    fits = stored is not None and len(stored) > _MATRIX and math.prod(stored) == math.prod(said)
    return module._replace(shape=stored) if fits else module
