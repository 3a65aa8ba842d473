"""What every adapter kind declares: the roles it needs, and what its shapes say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from loratools.model import Module
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

Factors = Mapping[str, TensorRef]
Shape = tuple[int, ...]


# LyCORIS' sparse residual, which may lie beside the factors of any kind and is added to ΔW.
SPARSE = ("bias_indices", "bias_values", "bias_size")


class StandIn(NamedTuple):
    """A base weight of rank one, W = left · rightᵀ: enough to tell two readings of a module apart by random probes.

    Attributes:
        left: (out,), float64.
        right: (in · kh · kw,), float64.
    """

    left: torch.Tensor
    right: torch.Tensor


class Applier(Protocol):
    """ΔW · x without building ΔW."""

    def __call__(self, module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:
        """What the module adds to the outputs.

        Args:
            module: Of this kind, without its magnitude.
            x: Inputs (in · kh · kw, n), float64.
            base: Stands for the base weight, for kinds whose ΔW depends on it.

        Returns:
            ΔW · x, scale included, as (out, n) in float64.
        """


class Kind(NamedTuple):
    """One adapter kind.

    Attributes:
        name: As shown and written in reports ("lora", "loha", …).
        title: The name people know it by.
        needs: Alternatives of roles; one of them must be there whole.
        may: Roles that may come along.
        rank: The rank that the factors' shapes say, or None.
        shape: The base weight's shape (out, in[, kh, kw]) that they say, or None.
        specific: Kinds with a higher value are tried first where two fit.
        low_rank: Whether ΔW is a product of two factors, so that it can be computed in factor space.
        row_axes: Along which axis of which factors the weight's rows run; the other factors serve all rows alike.
            None where the rows cannot be taken apart.
        products: Pairs of roles (left, right) that are multiplied over the rank: modules of several rows are one
            with left block-diagonal and right stacked. Kinds without any stack their row factors, if the others agree.
        needs_base: Whether ΔW depends on the base weight.
        apply: ΔW · x without building ΔW; None where it is not known how.
    """

    name: str
    title: str
    needs: tuple[tuple[str, ...], ...]
    may: tuple[str, ...] = ()
    rank: Callable[[Factors], int | None] = lambda _: None
    shape: Callable[[Factors], Shape | None] = lambda _: None
    specific: int = 1
    low_rank: bool = False
    row_axes: Callable[[Factors], Mapping[str, int] | None] = lambda _: None
    products: tuple[tuple[str, str], ...] = ()
    needs_base: bool = False
    apply: Applier | None = None

    def fits(self, roles: frozenset[str]) -> bool:
        """Whether these roles are exactly what the kind is made of."""
        known = {
            "alpha",
            "magnitude",
            "scalar",
            *SPARSE,
            *self.may,
            *(role for need in self.needs for role in need),
        }
        return roles <= known and any(roles >= set(need) for need in self.needs)


def first_axis(*roles: str) -> Callable[[Factors], int | None]:
    """The length of the first axis of whichever of these factors is there."""

    def rank(factors: Factors) -> int | None:
        return next((factors[role].shape[0] for role in roles if role in factors), None)

    return rank
