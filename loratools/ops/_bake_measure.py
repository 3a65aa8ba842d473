"""How much of ΔW is in what is stored."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import torch

from loratools.ops._bake_steps import Product

# Of larger tensors so many elements are measured, evenly spaced rows of them, and at least so many rows.
_WHOLE = 1 << 16
_SAMPLE = 1 << 14
_ROWS = 16


class Fidelity:
    """Sums over measured rows: with W the base, T = W + ΔW and Q what is stored."""

    def __init__(self) -> None:
        self._kept = self._error = self._change = 0.0

    def add(self, base: torch.Tensor, target: torch.Tensor, stored: torch.Tensor) -> None:
        """Take rows of W, T and Q in, all of one shape; W and T in the compute dtype."""
        wide = stored.to(target.dtype)
        change = torch.sub(target, base).flatten()
        self._change += float(torch.dot(change, change))
        self._kept += float(torch.dot(torch.sub(wide, base).flatten(), change))
        error = wide.sub(target).flatten()
        self._error += float(torch.dot(error, error))

    @property
    def norm(self) -> float:
        """‖ΔW‖ of the measured rows."""
        return math.sqrt(self._change)

    @property
    def kept(self) -> float | None:
        """⟨Q − W, ΔW⟩ / ‖ΔW‖²; None where ΔW is 0."""
        return self._kept / self._change if self._change else None

    @property
    def error(self) -> float | None:
        """‖Q − T‖ / ‖ΔW‖; None where ΔW is 0."""
        return math.sqrt(self._error / self._change) if self._change else None


def sample(products: Sequence[Product], rows: int, width: int) -> list[int] | None:
    """Rows to measure, evenly spaced among those that change, in order; None for all.

    Args:
        products: What changes the tensor.
        rows: How many it has.
        width: Elements per row.
    """
    if rows * width <= _WHOLE:
        return None
    covered = sorted({(at, at + stop - start) for step in products for start, stop, at in step.spans})
    changed: list[int] = []
    for first, last in covered:
        changed.extend(range(max(first, changed[-1] + 1 if changed else 0), min(last, rows)))
    count = max(_ROWS, _SAMPLE // width)
    if len(changed) <= count:
        return changed
    return [changed[number * len(changed) // count] for number in range(count)]


def within(rows: Sequence[int] | None, start: int, stop: int) -> list[int] | None:
    """Those of the rows that lie between ``start`` and ``stop``, counted from ``start``; None for all."""
    if rows is None:
        return None
    return [row - start for row in rows[bisect_left(rows, start) : bisect_left(rows, stop)]]


def placed(products: Sequence[Product], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All products as one: up (rows, Σ rank), factors included, and down (Σ rank, in · kh · kw), in float64."""
    ups = []
    for step in products:
        up = torch.zeros(rows, step.up.shape[1], dtype=torch.float64)
        for start, stop, at in step.spans:
            up[at : at + stop - start] = step.up[start:stop]
        ups.append(up.mul_(step.factor))
    return torch.cat(ups, dim=1), torch.cat([step.down.cpu().to(torch.float64) for step in products])


def norm_of(products: Sequence[Product], rows: int) -> float:
    """‖ΔW‖, Frobenius, without building ΔW: its square is the inner product of UᵀU and DDᵀ."""
    up, down = placed(products, rows)
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


def basis(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Orthonormal columns (n, r) that span those of a factor (n, rank); rows of zeros stay zeros."""
    zero = ~factor.any(dim=1)
    left, sigma, _ = torch.linalg.svd(factor, full_matrices=False)
    least = torch.finfo(factor.dtype).eps * max(factor.shape) * float(sigma.max() if len(sigma) else 0.0)
    left = left[:, sigma > least]
    left[zero] = 0.0
    columns: torch.Tensor = left.to(dtype)
    return columns
