"""Tensors in another store dtype: computed when they are asked for, a part at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools.model import Module
from loratools.tensors import DTYPES, LazySource, TensorRef

if TYPE_CHECKING:
    import torch

_PART = 1 << 18  # elements


def cast_module(module: Module, dtype: str) -> Module:
    """The module with its factors and its magnitude in another store dtype."""
    factors = {role: cast(ref, dtype) for role, ref in module.factors.items()}
    magnitude = cast(module.magnitude, dtype) if module.magnitude is not None else None
    return module._replace(factors=factors, magnitude=magnitude)


def cast(ref: TensorRef, dtype: str, factor: float = 1.0) -> TensorRef:
    """The tensor in another store dtype; a value that becomes infinite is an error when it is loaded.

    Args:
        ref: The tensor; its values stay as they are where they are not floating.
        dtype: The store dtype.
        factor: What the values are multiplied by beforehand, in float64.
    """
    if (ref.dtype == dtype and factor == 1.0) or not DTYPES[ref.dtype].floating:
        return ref
    if ref.transposed:
        return cast(ref.flipped(), dtype, factor).flipped()

    def load() -> Any:
        import torch

        before = ref.load().reshape(-1)
        after = torch.empty(before.shape, dtype=getattr(torch, DTYPES[dtype].torch))
        # A part at a time: what lies between the two dtypes may be several times as large.
        for start in range(0, len(before), _PART):
            part = before[start : start + _PART]
            wide = part if factor == 1.0 else part.to(torch.float64) * factor
            after[start : start + _PART] = wide
            _check_range(wide, after[start : start + _PART], dtype, ref.name)
        return after.reshape(ref.shape)

    return TensorRef(ref.name, ref.shape, dtype, LazySource(load))


def _check_range(before: torch.Tensor, after: torch.Tensor, dtype: str, name: str) -> None:
    import torch

    from loratools.errors import NonFiniteError

    if not torch.isfinite(_told(after)).all() and torch.isfinite(_told(before)).all():
        raise NonFiniteError(
            f"values up to {_told(before).abs().max().item():.3g} do not fit {dtype}",
            keys=[name],
            todo="Choose --dtype float32 or bfloat16",
        )


def _told(values: torch.Tensor) -> torch.Tensor:
    """The values as torch can tell whether they are finite, which it cannot where they have eight bits."""
    return values.float() if values.itemsize == 1 else values
