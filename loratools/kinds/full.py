"""Full differences (LyCORIS ``diff``): ΔW and Δbias stored as they are, norm layers included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratools.errors import UnsupportedKindError
from loratools.kinds._base import Factors, Kind, Shape, StandIn, by_rows, times, wide, with_residual
from loratools.model import Module
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_WEIGHTS = ("diff", "w_norm")


def _shape(factors: Factors) -> Shape | None:
    return next((factors[role].shape for role in _WEIGHTS if role in factors), None)


def _row_axes(factors: Factors) -> Mapping[str, int] | None:
    return by_rows(factors, diff=0, diff_b=0, w_norm=0, b_norm=0)


def _dense(module: Module, base: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001 - it adds to any base
    return module.scale * wide(_weight(module))


def _weight(module: Module) -> TensorRef:
    ref = next((module.factors[role] for role in _WEIGHTS if role in module.factors), None)
    if ref is None:
        raise UnsupportedKindError(
            f"{module.target} changes a bias alone and has no ΔW",
            keys=[ref.name for ref in module.factors.values() if ref.name],
            expected="A difference of the weight was expected",
        )
    return ref


def _apply(module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:  # noqa: ARG001 - it adds to any base
    ref = _weight(module)
    # A norm layer's weight multiplies its inputs one by one.
    changed = wide(ref)[:, None] * x if len(ref.shape) == 1 else times(ref, x)
    return module.scale * changed


KIND = Kind(
    name="full",
    title="full difference",
    needs=(("diff",), ("diff_b",), ("w_norm",), ("b_norm",)),
    shape=_shape,
    row_axes=_row_axes,
    apply=with_residual(_apply),
    dense=_dense,
)
