"""All modules of an adapter turned into LoRA."""

from __future__ import annotations

from dataclasses import replace

import torch

from loratools import kinds
from loratools.errors import UnsupportedKindError
from loratools.io.base import Base
from loratools.kinds import lora
from loratools.model import Adapter, Module, Target
from loratools.ops._base_weights import Weights
from loratools.ops._device import home, on, usable
from loratools.ops.as_lora import to_lora
from loratools.ops.results import Conversion


def as_lora(
    adapter: Adapter, *, rank: int | None, base: Base | None, dtype: str | None, device: str = "auto"
) -> tuple[Adapter, dict[str, Module], list[Conversion]]:
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
    place = usable(device)
    weights = Weights(base, adapter.arch) if base is not None else None
    modules: dict[Target, Module] = {}
    before: dict[str, Module] = {}
    done: list[Conversion] = []
    failed: list[tuple[Module, UnsupportedKindError]] = []
    for target, module in adapter.modules.items():
        modules[target] = module
        if (
            lora.is_product(module)
            and "mid" not in module.factors
            and (rank is None or (module.rank or 0) <= rank)
        ):
            continue
        try:
            weight = _base(module, weights)
            with torch.device(place):
                moved = weight.to(place) if weight is not None else None
                given = on(module, place)
                found = to_lora(given, rank=rank, base=moved, dtype=dtype)
        except UnsupportedKindError as error:
            failed.append((module, error))
            continue
        if found.module is not given:
            modules[target] = found.module if place == "cpu" else home(found.module)
            before[str(target)] = module
            kind = "dora" if module.magnitude is not None else module.kind
            done.append(Conversion(str(target), kind, found.module.rank or 0, found.error, found.exact))
    if failed:
        raise UnsupportedKindError(
            f"{len(failed)} of {len(adapter.modules)} modules cannot be turned into LoRA: {failed[0][1].problem}",
            path=adapter.path or None,
            keys=[str(module.target) for module, _ in failed],
            todo="Kinds whose ΔW depends on the base weight need --base" if base is None else "",
        )
    return replace(adapter, modules=modules), before, done


def _base(module: Module, weights: Weights | None) -> torch.Tensor | None:
    """The base weight, where the module's kind needs it or does not know its own kernel."""
    if weights is None:
        return None
    needed = module.magnitude is not None or kinds.get(module.kind).needs_base
    return weights.of(module) if needed or module.shape is None or len(module.shape) < 4 else None
