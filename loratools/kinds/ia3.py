"""(IA)³ (arXiv 2205.05638): the base weight's rows or columns are multiplied by a learned vector.

LyCORIS stores ``weight`` beside the flag ``on_input``, and W' = W · (1 + weight) along the inputs or the outputs. PEFT
stores ``ia3_l`` with W' = W · ia3_l: (out, 1) along the outputs, (1, in) along the inputs of feed-forward layers; a
convolution's is (1, n, 1, 1) for either, and only the weight's shape tells which. PEFT multiplies the bias along the
outputs as well, which ΔW does not show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratools.errors import ShapeError
from loratools.kinds._base import Factors, Kind, StandIn, by_rows, needed, wide, with_residual
from loratools.model import Module

if TYPE_CHECKING:
    import torch


def _on_input(factors: Factors) -> bool | None:
    """Whether the vector runs along the inputs; None where its own shape does not tell."""
    if "on_input" in factors:
        return bool(factors["on_input"].scalar())
    shape = factors["ia3_l"].shape
    if len(shape) > 2:
        return None
    return len(shape) == 2 and shape[0] == 1 and shape[1] > 1


def _row_axes(factors: Factors) -> Mapping[str, int] | None:
    on_input = _on_input(factors)
    if on_input is None:
        return None
    if on_input:
        return by_rows(factors)
    role = "ia3_weight" if "ia3_weight" in factors else "ia3_l"
    shape = factors[role].shape
    return by_rows(factors, **{role: max(range(len(shape)), key=lambda axis: shape[axis])})


def _change(module: Module, out: int, inputs: int) -> tuple[torch.Tensor, bool]:
    """What every row or input channel of W is multiplied by to give ΔW, and whether it runs along the inputs.

    Raises:
        ShapeError: The vector is as long as neither, or cannot be told to be one of them.
    """
    factors = module.factors
    ref = factors["ia3_weight"] if "ia3_weight" in factors else factors["ia3_l"]
    on_input = _on_input(factors)
    if on_input is None and out != inputs:
        on_input = ref.numel == inputs
    if on_input is None or ref.numel != (inputs if on_input else out):
        raise ShapeError(
            f"{module.target}: a vector of {ref.numel} for a weight of {out} outputs and {inputs} inputs",
            keys=[ref.name] if ref.name else [],
            expected="One value per output or per input was expected, and a shape that tells which",
            todo="Give the base model that the adapter was trained on",
        )
    vector = wide(ref).flatten()
    return (vector - 1.0 if "ia3_l" in factors else vector), on_input


def _dense(module: Module, base: torch.Tensor | None) -> torch.Tensor:
    base = needed(module, base, "(IA)³")
    change, on_input = _change(module, base.shape[0], base.shape[1])
    axis = 1 if on_input else 0
    return base * change.reshape([-1 if place == axis else 1 for place in range(base.ndim)])


def _apply(module: Module, x: torch.Tensor, base: StandIn) -> torch.Tensor:
    import torch

    # The stand-in has no channels: a vector along the inputs of a convolution is as long as a part of them.
    ref = module.factors.get("ia3_weight") or module.factors["ia3_l"]
    inputs = ref.numel if _on_input(module.factors) and len(x) % ref.numel == 0 else len(x)
    change, on_input = _change(module, len(base.left), inputs)
    if on_input:
        change = change.repeat_interleave(len(x) // len(change))
        return torch.outer(base.left, (base.right * change) @ x)
    return torch.outer(base.left * change, base.right @ x)


KIND = Kind(
    name="ia3",
    title="(IA)³",
    needs=(("ia3_l",), ("ia3_weight", "on_input")),
    row_axes=_row_axes,
    needs_base=True,
    apply=with_residual(_apply),
    dense=_dense,
)
