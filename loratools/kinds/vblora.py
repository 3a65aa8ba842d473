"""VB-LoRA (arXiv 2405.15179): ΔW = up · down, whose sub-vectors are mixtures of a bank that all modules share.

The bank is (vectors, length). ``logits_a`` (rank, in / length, vectors) says which vectors make up each stretch of
down's rows, and ``logits_b`` (out / length, rank, vectors) which make up each stretch of up's columns: the largest
``topk`` of them, weighted by their softmax. How many these are, the configuration says (``Module.variant``:
"topk=2", PEFT's default). Saved with ``save_only_topk_weights`` there are the indices (…, topk) and all weights but the
last (…, topk − 1), which add up to 1. Source: PEFT ``tuners/vblora/layer.py`` and ``model.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import ShapeError
from loratools.kinds._bank import picked
from loratools.kinds._base import (
    Factored,
    Factors,
    Kind,
    Shape,
    by_rows,
    first_axis,
    said,
    wide,
    with_residual,
)
from loratools.kinds._product import apply_of, dense_of
from loratools.model import Module

if TYPE_CHECKING:
    import torch

_TOPK = 2  # PEFT's default


def _shape(factors: Factors) -> Shape:
    form = "logits" if "vblora_logits_a" in factors else "indices"
    length = factors["vblora_bank"].shape[1]
    rows, columns = factors[f"vblora_{form}_b"].shape[0], factors[f"vblora_{form}_a"].shape[1]
    return (rows * length, columns * length)


def _mixed(module: Module, side: str) -> torch.Tensor:
    """The sub-vectors of one side, (…, …, length) in float64."""
    weights, indices = _chosen(module, side)
    return (weights[..., None] * picked(module, module.factors["vblora_bank"], indices)).sum(dim=-2)


def _chosen(module: Module, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights and the indices of the vectors that are mixed, both (…, …, topk)."""
    import torch

    factors = module.factors
    if f"vblora_logits_{side}" not in factors:
        weights = wide(factors[f"vblora_weights_{side}"])
        last = 1.0 - weights.sum(dim=-1, keepdim=True)
        return torch.cat([weights, last], dim=-1), factors[f"vblora_indices_{side}"].load().long()
    logits = wide(factors[f"vblora_logits_{side}"])
    topk = int(said(module).get("topk", _TOPK))
    if not 0 < topk <= logits.shape[-1]:
        raise ShapeError(
            f"{module.target}: the {topk} largest of {logits.shape[-1]} logits",
            keys=[ref.name for ref in factors.values() if ref.name],
            expected="A topk of at least 1, and of no more than there are vectors, was expected",
            todo="Correct topk in adapter_config.json",
        )
    largest, indices = logits.topk(topk, dim=-1)
    return largest.softmax(dim=-1), indices


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored:  # noqa: ARG001
    down = _mixed(module, "a").flatten(1)
    up = _mixed(module, "b").transpose(1, 2).flatten(0, 1)
    return Factored(up, down)


KIND = Kind(
    name="vblora",
    title="VB-LoRA",
    needs=(
        ("vblora_bank", "vblora_logits_a", "vblora_logits_b"),
        ("vblora_bank", "vblora_indices_a", "vblora_weights_a", "vblora_indices_b", "vblora_weights_b"),
    ),
    rank=first_axis("vblora_logits_a", "vblora_indices_a"),
    shape=_shape,
    scaled=False,
    shared=("vblora_bank",),
    row_axes=lambda factors: by_rows(factors, vblora_logits_b=0, vblora_indices_b=0, vblora_weights_b=0),
    apply=with_residual(apply_of(_factored)),
    dense=dense_of(_factored),
    factored=_factored,
)
