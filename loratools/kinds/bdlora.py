"""BD-LoRA (arXiv 2510.23346): ΔW = scale · up · down, of which one factor is stored as its diagonal blocks alone.

The blocks lie below each other: ``up_blocks`` (out, rank / n) stands for (out, rank), ``down_blocks`` (rank, in / n)
for (rank, in). How many there are (n) is the module's variant, "blocks=4". Source: PEFT ``tuners/lora/variants.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import ShapeError
from loratools.kinds._base import Factored, Factors, Kind, Shape, by_rows, said, wide, with_residual
from loratools.kinds._product import apply_of, dense_of
from loratools.model import Module

if TYPE_CHECKING:
    import torch


def _sized(module: Module) -> Shape:
    """The weight's (out, in), which the number of blocks tells."""
    factors = module.factors
    if "down" in factors:
        return (factors["up_blocks"].shape[0], factors["down"].shape[1])
    return (factors["up"].shape[0], factors["down_blocks"].shape[1] * _count(module))


def _rank(factors: Factors) -> int:
    return factors["down" if "down" in factors else "down_blocks"].shape[0]


def _count(module: Module) -> int:
    return int(said(module).get("blocks", "1"))


def _whole(module: Module, role: str) -> torch.Tensor:
    """A factor with the zeros beside its blocks, in float64."""
    import torch

    if role in module.factors:
        return wide(module.factors[role])
    ref = module.factors[f"{role}_blocks"]
    count = _count(module)
    if count < 1 or ref.shape[0] % count:
        raise ShapeError(
            f"{module.target}: {ref.shape[0]} rows cannot be cut into {count} blocks",
            keys=[ref.name],
            expected="A number of blocks was expected that divides them (nblocks of use_bdlora)",
            todo="Put the configuration of the training beside the weights",
        )
    parts, (height, width) = wide(ref).chunk(count), ref.shape
    whole = torch.zeros(height, width * count, dtype=torch.float64)
    step = height // count
    for number, part in enumerate(parts):
        whole[number * step : (number + 1) * step, number * width : (number + 1) * width] = part
    return whole


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored:  # noqa: ARG001
    up, down = _whole(module, "up"), _whole(module, "down")
    if up.shape[1] != down.shape[0]:
        raise ShapeError(
            f"{module.target}: up is {list(up.shape)}, down is {list(down.shape)}, with the zeros beside their blocks",
            keys=[ref.name for ref in module.factors.values()],
            expected="They must share the rank",
            todo="Put the configuration of the training beside the weights",
        )
    return Factored(up, down)


KIND = Kind(
    name="bdlora",
    title="BD-LoRA",
    needs=(("up_blocks", "down"), ("up", "down_blocks")),
    rank=_rank,
    sized=_sized,
    specific=2,
    row_axes=lambda factors: by_rows(factors, up=0) if "up" in factors else None,
    apply=with_residual(apply_of(_factored)),
    dense=dense_of(_factored),
    factored=_factored,
)
