"""LoHa (arXiv 2108.06098, LyCORIS): ΔW = scale · (w1_a w1_b) ∘ (w2_a w2_b).

The a factors are (out, rank), the b factors (rank, in · kh · kw). In the Tucker form that convolutions may have, each
pair has a core t (rank, rank, kh, kw) and a is (rank, out), b (rank, in):
w[o, i, y, x] = Σ t[p, q, y, x] · b[q, i] · a[p, o].
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


def _shape(factors: Factors) -> Shape | None:
    first, second = factors["hada_w1_a"], factors["hada_w1_b"]
    if "hada_t1" in factors:
        return (first.shape[1], second.shape[1], *factors["hada_t1"].shape[2:])
    return (first.shape[0], second.shape[1])


def _row_axes(factors: Factors) -> Mapping[str, int] | None:
    axis = 1 if "hada_t1" in factors else 0
    return by_rows(factors, hada_w1_a=axis, hada_w2_a=axis)


def _pair(factors: Factors, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One of the two products as matrices (out, rank) and (rank, in · kh · kw); a core goes into the second."""
    import torch

    left, right = wide(factors[f"hada_w{number}_a"]), wide(factors[f"hada_w{number}_b"])
    core = factors.get(f"hada_t{number}")
    if core is None:
        return left, right.flatten(1)
    return left.T, torch.einsum("pq...,qi->pi...", wide(core), right).flatten(1)


def _dense(module: Module, base: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001 - it adds to any base
    (one_left, one_right), (two_left, two_right) = _pair(module.factors, 1), _pair(module.factors, 2)
    return (one_left @ one_right).mul_(two_left @ two_right).mul_(module.scale)


def _apply(module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:  # noqa: ARG001 - it adds to any base
    import torch

    (one_left, one_right), (two_left, two_right) = _pair(module.factors, 1), _pair(module.factors, 2)
    # For one input: Σ_c (a1 b1)[o, c] · (a2 b2)[o, c] · x[c] = a1[o] · (b1 diag(x) b2ᵀ) · a2[o]ᵀ.
    outputs = [
        ((one_left @ ((one_right * probe) @ two_right.T)) * two_left).sum(dim=1) for probe in x.unbind(dim=1)
    ]
    return module.scale * torch.stack(outputs, dim=1)


def _factored(module: Module, base: torch.Tensor | None, rank: int | None) -> Factored | None:  # noqa: ARG001
    from loratools.maths import kron, lowrank

    one, two = (lowrank.Factors(*_pair(module.factors, number)) for number in (1, 2))
    if one.rank * two.rank >= min(one.shape):
        return None
    found = kron.khatri_rao(one, two)
    return Factored(found.up, found.down)


KIND = Kind(
    name="loha",
    title="LoHa",
    needs=(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    may=("hada_t1", "hada_t2"),
    rank=first_axis("hada_w1_b"),
    shape=_shape,
    row_axes=_row_axes,
    products=(("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
    linear=("hada_w1_a",),
    apply=with_residual(_apply),
    dense=_dense,
    factored=_factored,
)
