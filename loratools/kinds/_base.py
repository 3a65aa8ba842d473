"""What every adapter kind declares: the roles it needs, and what its shapes say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from loratools.tensors import TensorRef

Factors = Mapping[str, TensorRef]
Shape = tuple[int, ...]


# LyCORIS' sparse residual, which may lie beside the factors of any kind and is added to ΔW.
SPARSE = ("bias_indices", "bias_values", "bias_size")


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
    """

    name: str
    title: str
    needs: tuple[tuple[str, ...], ...]
    may: tuple[str, ...] = ()
    rank: Callable[[Factors], int | None] = lambda _: None
    shape: Callable[[Factors], Shape | None] = lambda _: None
    specific: int = 1
    low_rank: bool = False

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
