"""Modules whose rows are to be taken apart or put together: what follows the rows, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping

from loratools import kinds
from loratools.errors import ShapeError, UnsupportedKindError
from loratools.kinds import oft
from loratools.model import Module
from loratools.tensors import TensorRef

# Kernels' cores of Tucker forms: of several parts' there is no block-diagonal form among the factors.
CORES = frozenset({"mid", "hada_t1", "hada_t2"})
# LyCORIS' trained multiplier: the reader has multiplied it into the scale.
_IN_SCALE = "scalar"


def settled(module: Module) -> Module:
    """The module without what its scale says already."""
    if _IN_SCALE not in module.factors:
        return module
    return module._replace(factors={role: ref for role, ref in module.factors.items() if role != _IN_SCALE})


def a_name(module: Module) -> str:
    """A key of the module in its file, or what it changes."""
    return next((ref.name for ref in module.factors.values() if ref.name), str(module.target))


def flat(magnitude: TensorRef) -> TensorRef:
    """A magnitude as (out,)."""
    return magnitude.reshaped((magnitude.numel,))


def row_axes(module: Module, parts: int) -> Mapping[str, int]:
    """Along which axis each factor follows the weight's rows.

    Raises:
        ShapeError: They do not fall on whole shares.
        UnsupportedKindError: The rows cannot be taken apart.
    """
    kind = kinds.get(module.kind)
    axes = kind.row_axes(module.factors)
    keys = [ref.name for _, ref in module.tensors() if ref.name]
    if axes is None:
        raise UnsupportedKindError(
            f"{module.target}: the rows of a {kind.title} module cannot be taken apart",
            keys=keys,
            todo="Turn it into LoRA with --as lora",
        )
    if module.kind == "oft" and oft.constraint(module) > 0:
        raise UnsupportedKindError(
            f"{module.target}: the constraint on its rotation is one of all rows together",
            keys=keys,
            todo="Turn it into LoRA with --as lora --base",
        )
    if module.magnitude is not None and module.magnitude_axis == "in":
        raise UnsupportedKindError(
            f"{module.target}: its magnitude per input is that of all rows together",
            keys=keys,
            todo="Turn it into LoRA with --as lora --base",
        )
    for role, axis in axes.items():
        if module.factors[role].shape[axis] % parts:
            raise ShapeError(
                f"{module.target}: {module.factors[role].shape[axis]} rows of its {role} cannot be parted into "
                f"{parts} equal shares",
                keys=keys,
                todo="Turn it into LoRA with --as lora" if module.kind != "lora" else "",
            )
    return axes
