"""Adapter kinds: which factors make one, and what their shapes say. One file each; none knows a key's name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from loratools.errors import UnsupportedKindError
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


def delta(module: Module) -> torch.Tensor:
    """ΔW of a module, scale included, as a float32 tensor of the base weight's shape.

    Raises:
        UnsupportedKindError: The kind's ΔW cannot be computed from its factors alone.
    """
    if module.kind != "lora":
        title = get(module.kind).title
        raise UnsupportedKindError(
            f"{module.target}: the ΔW of {title} modules cannot be computed yet",
            expected="LoRA and LoCon modules were expected",
        )
    return lora.delta(module)
