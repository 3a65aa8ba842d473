"""Adapter kinds: which factors make one, and what their shapes say. One file each; none knows a key's name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from loratools.kinds import lora
from loratools.kinds._base import Kind
from loratools.model import Module
from loratools.registry import scan

if TYPE_CHECKING:
    import torch

__all__ = ["Kind", "delta", "get", "of_roles"]


@cache
def _by_precedence() -> tuple[Kind, ...]:
    return tuple(sorted(scan("loratools.kinds", "KIND").values(), key=lambda kind: -kind.specific))


def get(name: str) -> Kind:
    """The kind of this name.

    Raises:
        KeyError: No such kind.
    """
    kind: Kind = scan("loratools.kinds", "KIND")[name]
    return kind


def of_roles(roles: Iterable[str]) -> Kind | None:
    """The kind that these roles make, or None where they make none."""
    return _of_roles(frozenset(roles))


@cache
def _of_roles(roles: frozenset[str]) -> Kind | None:
    # Nearly every module is a LoRA, and no other kind is made of its roles alone: the others need not be imported.
    if lora.KIND.fits(roles):
        return lora.KIND
    return next((kind for kind in _by_precedence() if kind.fits(roles)), None)


def delta(module: Module, base: torch.Tensor | None = None, *, wide: bool = False) -> torch.Tensor:
    """ΔW of a module, scale and magnitude included, of the base weight's shape (out, in[, kh, kw]).

    Args:
        module: Of any kind.
        base: The rows of the base weight that the module changes, (out, in[, kh, kw]). It is needed for DoRA, and for
            kinds that change the base instead of adding to it; where it is given, it tells the shape.
        wide: Whether the result is float64 as computed, instead of float32.

    Raises:
        UnsupportedKindError: It is not known how to compute it, or the base is needed and not there.
        ShapeError: The base's shape is not the module's.
    """
    from loratools.kinds import _delta

    return _delta.delta(module, get(module.kind), base, wide=wide)
