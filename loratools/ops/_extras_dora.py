"""DoRA in a merge: each module as its change of the base's weight, ΔW = m · (W + s·BA) / ‖W + s·BA‖ − W.

Magnitudes have no sum, and neither have products inside of norms; differences have. ΔW is of full rank, so that the
merge truncates it to the rank asked for and reports what that loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from loratools import kinds
from loratools.errors import OptionError, UnsupportedKindError
from loratools.model import Adapter, Module
from loratools.ops import as_lora
from loratools.ops._extras_base import BaseModel
from loratools.ops._places import Place
from loratools.tensors import LazySource, TensorRef

# What is read of ΔW; the result has the inputs' dtype.
_WIDE = "F64"


def changes(adapters: Sequence[Adapter], base: BaseModel | None, rank: int | None) -> list[Adapter]:
    """The adapters with every DoRA module as two factors of full rank, ΔW and an identity, computed when they are read.

    Args:
        adapters: Any.
        base: What they were trained on.
        rank: Of the result, a count, or None.

    Raises:
        UnsupportedKindError: There is DoRA and no base, or the base lacks a weight.
        OptionError: There is DoRA and no rank.
    """
    found = [module for adapter in adapters for module in adapter.modules.values() if _is_dora(module)]
    if not found:
        return list(adapters)
    paths = [adapter.path for adapter in adapters if any(map(_is_dora, adapter.modules.values()))]
    if base is None:
        raise UnsupportedKindError(
            f"{len(found)} modules are DoRA: their ΔW depends on the base weights",
            path=paths[0] or None,
            keys=[str(module.target) for module in found],
            expected="The model that they were trained on was expected",
            todo="Give it with --base, and the result's rank with --rank; or bake them into the base one by one",
        )
    if rank is None:
        raise OptionError(
            f"the ΔW of {len(found)} DoRA modules is of full rank",
            path=paths[0] or None,
            keys=[str(module.target) for module in found],
            expected="A rank for the result was expected",
            todo="Choose one with --rank; the report says how much of Σσ² it keeps",
        )
    return [_changed(adapter, base) for adapter in adapters]


def store_dtype(adapters: Sequence[Adapter]) -> str | None:
    """The dtype of a result whose DoRA modules are computed: the inputs' own; None where there is no DoRA."""
    modules = [module for adapter in adapters for module in adapter.modules.values()]
    if not any(map(_is_dora, modules)):
        return None
    found = {as_lora.store_dtype(module) for module in modules}
    return found.pop() if len(found) == 1 else "F32"


def _is_dora(module: Module) -> bool:
    return module.magnitude is not None


def _changed(adapter: Adapter, base: BaseModel) -> Adapter:
    doras = [module for module in adapter.modules.values() if _is_dora(module)]
    if not doras:
        return adapter
    places = base.places(doras)
    modules = {
        target: _as_factors(module, base, places[target]) if _is_dora(module) else module
        for target, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def _as_factors(module: Module, base: BaseModel, place: Place) -> Module:
    """A DoRA module as ΔW times an identity, on the side that has fewer rows."""
    height = sum(stop - start for piece in place.pieces for start, stop, _ in piece.spans)
    first = place.pieces[0]
    width = first.weight.shape[:1] if first.turned else first.weight.shape[1:]
    shape = module.shape or (height, *width)
    rows, columns = shape[0], prod(shape[1:])

    def delta() -> torch.Tensor:
        weight = base.weight(place).reshape(shape)
        return kinds.delta(module, weight, wide=True).reshape(rows, columns)

    wide = columns > rows
    rank = min(rows, columns)
    made = TensorRef("", (rows, columns), _WIDE, LazySource(delta))
    unit = TensorRef("", (rank, rank), _WIDE, LazySource(lambda: torch.eye(rank, dtype=torch.float64)))
    factors = {"up": unit, "down": made} if wide else {"up": made, "down": unit}
    bias = module.factors.get("up_bias")
    if bias is not None:
        factors["up_bias"] = _scaled(bias, module.scale)
    if "diff_b" in module.factors:
        factors["diff_b"] = module.factors["diff_b"]
    return module._replace(
        kind="lora",
        factors=factors,
        scale=1.0,
        alpha=float(rank),
        alpha_tensor=None,
        rank=rank,
        shape=shape,
        magnitude=None,
        magnitude_axis=None,
        variant="",
    )


def _scaled(bias: TensorRef, scale: float) -> TensorRef:
    return TensorRef("", bias.shape, _WIDE, LazySource(lambda: bias.load().to(torch.float64) * scale))
