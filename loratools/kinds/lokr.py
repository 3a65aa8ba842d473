"""LoKr (LyCORIS): ΔW = scale · w1 ⊗ w2, either of them whole or as a product of two factors.

w1 is (out₁, in₁) and w2 (out₂, in₂[, kh, kw]); rows and inputs of the weight are numbered w1's first. A product has
the factors a (out, rank) and b (rank, in[ · kh · kw]), or, with a core t2 (rank, rank, kh, kw), w2_a (rank, out₂) and
w2_b (rank, in₂): w2[o, i, y, x] = Σ t2[p, q, y, x] · w2_a[p, o] · w2_b[q, i].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratools.kinds._base import (
    Factored,
    Factors,
    Kind,
    Shape,
    StandIn,
    by_rows,
    first_axis,
    wide,
    with_residual,
)
from loratools.model import Module

if TYPE_CHECKING:
    import torch

    from loratools.maths.lowrank import Svd


def _shape(factors: Factors) -> Shape | None:
    left = _factor_shape(factors, "lokr_w1")
    right = _factor_shape(factors, "lokr_w2")
    if left is None or right is None:
        return None
    kernel = factors["lokr_t2"].shape[2:] if "lokr_t2" in factors else right[2:]
    return (left[0] * right[0], left[1] * right[1], *kernel)


def _factor_shape(factors: Factors, name: str) -> Shape | None:
    if name in factors:
        return factors[name].shape
    a, b = factors.get(f"{name}_a"), factors.get(f"{name}_b")
    if a is None or b is None:
        return None
    rows = a.shape[1] if name == "lokr_w2" and "lokr_t2" in factors else a.shape[0]
    return (rows, *b.shape[1:])


def _row_axes(factors: Factors) -> Mapping[str, int] | None:
    left = _factor_shape(factors, "lokr_w1")
    if left is not None and left[0] == 1:
        # The weight's rows are those of w2 alone.
        return by_rows(factors, lokr_w2=0, lokr_w2_a=1 if "lokr_t2" in factors else 0)
    return by_rows(factors, lokr_w1=0, lokr_w1_a=0)


def _part_axes(factors: Factors) -> Mapping[str, int] | None:
    left = _factor_shape(factors, "lokr_w1")
    # What was cut along w1, row by row, has w2 in common.
    return by_rows(factors, lokr_w1=0, lokr_w1_a=0) if left is not None and left[0] == 1 else None


def _pair(factors: Factors, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A side that is stored as a product, as matrices (out, rank) and (rank, in[ · kh · kw])."""
    import torch

    if name in factors:
        return None
    left, right = wide(factors[f"{name}_a"]), wide(factors[f"{name}_b"])
    if name == "lokr_w2" and "lokr_t2" in factors:
        return left.T, torch.einsum("pq...,qi->pi...", wide(factors["lokr_t2"]), right).flatten(1)
    return left, right.flatten(1)


def _side(factors: Factors, name: str) -> torch.Tensor:
    """A side as a contiguous matrix (out, in[ · kh · kw])."""
    pair = _pair(factors, name)
    return wide(factors[name]).flatten(1).contiguous() if pair is None else pair[0] @ pair[1]


def _dense(module: Module, base: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001 - it adds to any base
    import torch

    return torch.kron(module.scale * _side(module.factors, "lokr_w1"), _side(module.factors, "lokr_w2"))


def _apply(module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:  # noqa: ARG001 - it adds to any base
    import torch

    left, right = _side(module.factors, "lokr_w1"), _side(module.factors, "lokr_w2")
    inputs = x.reshape(left.shape[1], right.shape[1], -1)
    partly = torch.einsum("pj,ijn->ipn", right, inputs)
    return module.scale * torch.einsum("oi,ipn->opn", left, partly).flatten(0, 1)


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored:  # noqa: ARG001
    from loratools.maths import kron, lowrank

    if rank is not None:
        best = kron.leading(_svd(module.factors, "lokr_w1"), _svd(module.factors, "lokr_w2"), rank)
        return Factored(best.factors.up, best.factors.down, best.energy)
    sides = []
    for name in ("lokr_w1", "lokr_w2"):
        pair = _pair(module.factors, name)
        narrow = pair is not None and pair[0].shape[1] < min(pair[0].shape[0], pair[1].shape[1])
        sides.append(lowrank.Factors(*pair) if pair and narrow else kron.thin(_side(module.factors, name)))
    found = kron.kronecker(*sides)
    return Factored(found.up, found.down)


def _svd(factors: Factors, name: str) -> Svd:
    from loratools.maths import lowrank

    pair = _pair(factors, name)
    return lowrank.dense_svd(_side(factors, name)) if pair is None else lowrank.svd(lowrank.Factors(*pair))


KIND = Kind(
    name="lokr",
    title="LoKr",
    needs=tuple(
        (*first, *second)
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    may=("lokr_t2",),
    rank=first_axis("lokr_w1_b", "lokr_w2_b"),
    shape=_shape,
    row_axes=_row_axes,
    part_axes=_part_axes,
    linear=("lokr_w1", "lokr_w1_a"),
    apply=with_residual(_apply),
    dense=_dense,
    factored=_factored,
)
