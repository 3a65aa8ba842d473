"""ΔW as a whole: what a kind's factors make, what lies beside them, and DoRA around both.

DoRA (arXiv 2402.09353), as LyCORIS applies it to any kind: W' = m · (W + ΔW) / ‖W + ΔW‖, with the norm over all axes
but the magnitude's, so that the change is W' − W. The smallest float32 step is added to the norm, as LyCORIS does
for a magnitude in float32; PEFT adds nothing, and differs only where a norm is about 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loratools.errors import ShapeError, UnsupportedKindError
from loratools.kinds._base import Kind, needed, residual
from loratools.kinds._base import wide as widened
from loratools.model import Module

if TYPE_CHECKING:
    import torch

_EPS = 2.0**-23


def delta(module: Module, kind: Kind, base: torch.Tensor | None, *, wide: bool) -> torch.Tensor:
    """ΔW of a module; see ``loratools.kinds.delta``."""
    import torch

    if kind.dense is None:
        raise UnsupportedKindError(
            f"{module.target}: the ΔW of {kind.title} modules cannot be computed yet",
            expected="A kind was expected whose ΔW is known: LoRA, LoHa, LoKr, OFT, VeRA, MiSS, (IA)³, …",
        )
    check_base(module, kind, base)
    weight = None if base is None else base.detach().to(torch.empty(0).device, torch.float64)
    change = kind.dense(module, weight)
    beside = residual(module)
    if beside is not None:
        change = change.flatten(1) + beside.to_dense()
    shape = change.shape if weight is None else weight.shape
    if weight is None and math.prod(module.shape or ()) == change.numel():
        shape = torch.Size(module.shape or ())
    change = change.reshape(shape)
    if module.magnitude is not None and weight is not None:
        change = _decomposed(module, weight, weight + change) - weight
    return change if wide else change.to(torch.float32)


def check_base(module: Module, kind: Kind, base: torch.Tensor | None) -> None:
    """Refuse a module whose base weight is missing, or is of another shape than the factors say.

    Raises:
        UnsupportedKindError: It is needed and missing.
        ShapeError: It does not fit.
    """
    needless = not kind.needs_base or kind.alone(module)
    if base is None and needless and module.magnitude is None:
        return
    base = needed(module, base, kind.title if module.magnitude is None else "DoRA")
    said = module.shape
    if said is not None and (base.shape[0] != said[0] or base.numel() != math.prod(said)):
        raise ShapeError(
            f"{module.target}: the factors are for a weight of shape {list(said)}, the base's is {list(base.shape)}",
            keys=[ref.name for _, ref in module.tensors() if ref.name],
            expected="The rows that the module changes were expected, as (out, in) or (out, in, kh, kw)",
            todo="Give the base model that the adapter was trained on",
        )


def _decomposed(module: Module, weight: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """DoRA's weight from W and W + ΔW, both of the weight's shape."""
    import torch

    if module.magnitude is None:
        return changed
    axis = 1 if module.magnitude_axis == "in" else 0
    magnitude = widened(module.magnitude).flatten()
    if magnitude.numel() != weight.shape[axis]:
        raise ShapeError(
            f"{module.target}: {magnitude.numel()} magnitudes for a weight of shape {list(weight.shape)}",
            keys=[module.magnitude.name],
            expected=f"One per {'input' if axis else 'output'} was expected",
            todo="The file is damaged, or it was made for another base model",
        )
    others = [other for other in range(weight.ndim) if other != axis]
    norm: torch.Tensor = torch.linalg.vector_norm(changed, dim=others, keepdim=True) + _EPS
    return changed * (magnitude.reshape(norm.shape) / norm)
