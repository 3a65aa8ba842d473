"""GLoRA (arXiv 2306.07967): ΔW = scale · (b1 b2 + W a1 a2); it needs the base weight.

a1 is (in, rank), a2 (rank, in), b1 (out, rank) and b2 (rank, in[, kh, kw]), as LyCORIS stores them. On a convolution
a1 and a2 mix the input channels at every place of the kernel, and with bm (rank, rank, kh, kw) the b part has
LoCon's Tucker form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import ShapeError
from loratools.kinds._base import (
    Factored,
    Factors,
    Kind,
    Shape,
    StandIn,
    by_rows,
    first_axis,
    needed,
    wide,
    with_residual,
)
from loratools.model import Module

if TYPE_CHECKING:
    import torch


def _shape(factors: Factors) -> Shape | None:
    kernel = factors.get("glora_bm", factors["glora_b2"]).shape[2:]
    return (factors["glora_b1"].shape[0], factors["glora_b2"].shape[1], *kernel)


def _part_a(module: Module) -> tuple[torch.Tensor, torch.Tensor]:
    """a1 (in, rank) and a2 (rank, in)."""
    return wide(module.factors["glora_a1"]).flatten(1), wide(module.factors["glora_a2"]).flatten(1)


def _part_b(module: Module) -> tuple[torch.Tensor, torch.Tensor]:
    """b1 (out, rank) and b2 (rank, in · kh · kw); bm goes into the second."""
    import torch

    left, right = wide(module.factors["glora_b1"]).flatten(1), wide(module.factors["glora_b2"])
    if "glora_bm" in module.factors:
        right = torch.einsum("pq...,qi->pi...", wide(module.factors["glora_bm"]), right.flatten(1))
    return left, right.flatten(1)


def _through_a(module: Module, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W a1 (out, rank, kh · kw) and a2 (rank, in).

    Raises:
        ShapeError: The base has another count of inputs.
    """
    import torch

    left, right = _part_a(module)
    if base.shape[1] != left.shape[0]:
        raise ShapeError(
            f"{module.target}: a1 is {list(left.shape)}, the base weight {list(base.shape)}",
            keys=[ref.name for ref in module.factors.values() if ref.name],
            expected="a1 (in, rank) was expected for a weight (out, in[, kh, kw])",
            todo="Give the base model that the adapter was trained on",
        )
    return torch.einsum("oi...,ir->or...", base, left).reshape(base.shape[0], left.shape[1], -1), right


def _dense(module: Module, base: torch.Tensor | None) -> torch.Tensor:
    import torch

    left, right = _part_b(module)
    through, out_of = _through_a(module, needed(module, base, "GLoRA"))
    changed = torch.einsum("ork,ri->oik", through, out_of).flatten(1)
    return module.scale * (left @ right + changed)


def _apply(module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:
    import torch

    left, right = _part_b(module)
    into, out_of = _part_a(module)
    # W = left · rightᵀ, and each place of the kernel by itself: right is (in, kh · kw).
    places = x.reshape(into.shape[0], -1, x.shape[1])
    read = base.right.reshape(into.shape[0], -1)
    sums = torch.einsum("ik,ir,rj,jkn->n", read, into, out_of, places)
    return module.scale * (left @ (right @ x) + torch.outer(base.left, sums))


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored | None:  # noqa: ARG001
    import torch

    left, right = _part_b(module)
    through, out_of = _through_a(module, needed(module, base, "GLoRA"))
    places = through.shape[2]
    if left.shape[1] + through.shape[1] * places >= min(left.shape[0], right.shape[1]):
        return None
    # Σ_r through[o, r, k] · a2[r, i], one rank for every r and every place k of the kernel.
    down = torch.einsum("ri,kl->rkil", out_of, torch.eye(places, dtype=out_of.dtype))
    down = down.reshape(through.shape[1] * places, -1)
    return Factored(torch.cat([left, through.flatten(1)], dim=1), torch.cat([right, down]))


KIND = Kind(
    name="glora",
    title="GLoRA",
    needs=(("glora_a1", "glora_a2", "glora_b1", "glora_b2"),),
    may=("glora_bm",),
    rank=first_axis("glora_a2"),
    shape=_shape,
    row_axes=lambda factors: by_rows(factors, glora_b1=0),
    needs_base=True,
    apply=with_residual(_apply),
    dense=_dense,
    factored=_factored,
)
