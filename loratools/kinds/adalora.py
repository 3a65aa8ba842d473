"""AdaLoRA (arXiv 2303.10512): ΔW = scale · up · diag(E) · down, with ranks pruned while training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.kinds._base import (
    Factored,
    Factors,
    Kind,
    Shape,
    by_rows,
    first_axis,
    wide,
    with_residual,
)
from loratools.kinds._product import apply_of, dense_of
from loratools.model import Module

if TYPE_CHECKING:
    import torch


def _shape(factors: Factors) -> Shape:
    return (factors["up"].shape[0], factors["down"].shape[1])


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored:  # noqa: ARG001
    factors = module.factors
    return Factored(wide(factors["up"]), wide(factors["lora_E"]).reshape(-1, 1) * wide(factors["down"]))


KIND = Kind(
    name="adalora",
    title="AdaLoRA",
    needs=(("up", "down", "lora_E"),),
    may=("ranknum",),
    rank=first_axis("down"),
    shape=_shape,
    specific=2,
    row_axes=lambda factors: by_rows(factors, up=0),
    apply=with_residual(apply_of(_factored)),
    dense=dense_of(_factored),
    factored=_factored,
)
