"""ΔW of the kinds that are a product of two factors and know nothing more of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loratools.kinds._base import Applier, Dense, Factored, StandIn
from loratools.model import Module

if TYPE_CHECKING:
    import torch

Product = Callable[["Module", "torch.Tensor | None", "int | None"], Factored]
"""As ``Factoring``, of a kind that always has factors."""


def dense_of(factored: Product) -> Dense:
    """ΔW as a whole, (out, in): scale · up · down."""

    def dense(module: Module, base: torch.Tensor | None) -> torch.Tensor:
        up, down, _ = factored(module, base, None)
        return module.scale * (up @ down)

    return dense


def apply_of(factored: Product) -> Applier:
    """ΔW · x by its factors, which do not depend on the base."""

    def apply(module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:  # noqa: ARG001 - it adds to any base
        up, down, _ = factored(module, None, None)
        return module.scale * (up @ (down @ x))

    return apply
