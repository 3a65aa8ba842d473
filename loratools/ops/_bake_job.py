"""What is asked of the baker of one tensor, and what it gives: plain data, for whoever computes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from loratools.ops._changes import Change
from loratools.ops.checkpoint_results import BakedTensor

if TYPE_CHECKING:
    import torch


class BakeJob(NamedTuple):
    """One tensor's work; it can be sent to another process where its adapters' tensors can.

    Attributes:
        change: What is done to it.
        precise: Whether to compute in float64 instead of float32.
        rounding: "nearest", "stochastic" or "compensated".
        seed: Of stochastic rounding; draws depend on it and on the tensor's key alone.
        device: Where to multiply matrices, but in float64 where it has none; rounding is done on the CPU.
        dtype: The store dtype, a safetensors name; None for the base's own, with its float8 scales.
    """

    change: Change
    precise: bool = False
    rounding: str = "nearest"
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None


class BakedData(NamedTuple):
    """One changed tensor.

    Attributes:
        key: Its name in the base.
        data: As it is to be stored, contiguous, on the CPU.
        scale: Its float8 scales where they changed, in their shape and dtype; else None.
        result: What became of ΔW.
    """

    key: str
    data: torch.Tensor
    scale: torch.Tensor | None
    result: BakedTensor


class Exact(NamedTuple):
    """One changed tensor before it is rounded.

    Attributes:
        shape: As it is stored.
        turned: Whether it is stored as (in, out).
        rows: First row, the one behind the last, and the rows with outputs first, each valid until the next.
        base: The unchanged tensor as it is stored, or dequantised where it has scales.
    """

    shape: tuple[int, ...]
    turned: bool
    rows: Iterator[tuple[int, int, torch.Tensor]]
    base: torch.Tensor
