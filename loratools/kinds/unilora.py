"""Uni-LoRA (arXiv 2506.00799): ΔW = up · down, both picked out of one trained vector that all modules share.

down[p, i] = theta[indices_a[p, i]] · scales_a[p, i] is (rank, in), up likewise (out, rank) from the b tensors; a scale
is one over the square root of how often its entry is picked in the whole model. PEFT stores indices and scales only
where its ``save_indices`` is set. Else they follow from a seed, and from all adapted weights in the order in which the
model's code defines them, which neither the adapter nor a checkpoint tells. Source: PEFT ``tuners/unilora/model.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import UnsupportedKindError
from loratools.kinds._bank import picked
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

_SIDES = ("indices_a", "indices_b", "scales_a", "scales_b")
_PROJECTION = tuple(f"unilora_{side}" for side in _SIDES)


def _shape(factors: Factors) -> Shape | None:
    if "unilora_indices_a" not in factors:
        return None
    return (factors["unilora_indices_b"].shape[0], factors["unilora_indices_a"].shape[1])


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored:  # noqa: ARG001
    up, down = (_side(module, side) for side in ("b", "a"))
    return Factored(up, down)


def _side(module: Module, side: str) -> torch.Tensor:
    factors = module.factors
    indices = factors.get(f"unilora_indices_{side}")
    if indices is None:
        raise UnsupportedKindError(
            f"{module.target}: only the trained vector of a Uni-LoRA is stored, not which weights its values go to",
            keys=[ref.name for ref in factors.values() if ref.name],
            expected="unilora_indices and unilora_scales of every module were expected",
            todo="Save the adapter again with PEFT and save_indices=True",
        )
    return picked(module, factors["unilora_theta"], indices.load().long()) * wide(
        factors[f"unilora_scales_{side}"]
    )


KIND = Kind(
    name="unilora",
    title="Uni-LoRA",
    needs=(("unilora_theta", *_PROJECTION), ("unilora_theta",)),
    rank=first_axis("unilora_indices_a"),
    shape=_shape,
    scaled=False,
    shared=("unilora_theta",),
    row_axes=lambda factors: by_rows(factors, unilora_indices_b=0, unilora_scales_b=0),
    apply=with_residual(apply_of(_factored)),
    dense=dense_of(_factored),
    factored=_factored,
)
