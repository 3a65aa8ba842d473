"""Some rows of a module's ΔW at a time, so that the whole is never held where its kind allows that."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from loratools import kinds
from loratools.errors import ShapeError
from loratools.kinds import experts, lora, oft
from loratools.model import Module
from loratools.tensors import TensorRef, from_torch


class DeltaRows:
    """ΔW of a module without its magnitude, by rows.

    Attributes:
        rows: How many there are.
        product: up (rows, rank), down (rank, in · kh · kw) where ΔW is their product times ``scale``, else None.
        scale: The module's, for the product.
    """

    def __init__(
        self, module: Module, rows: int, base: torch.Tensor | None, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        """Prepare.

        Args:
            module: Of any kind that can be computed.
            rows: How many ΔW has.
            base: What it changes, (rows, in[, kh, kw]), where its ΔW or its magnitude depends on that.
            dtype: To compute in: float32 or float64.
            device: Where.

        Raises:
            ShapeError: The factors are for another count of rows.
        """
        self._module = bare(module)
        self.base = base
        self._dtype = dtype
        self._device = device
        self.rows = rows
        self.scale = module.scale
        self.product: tuple[torch.Tensor, torch.Tensor] | None = None
        if lora.is_product(self._module):
            up, down = lora.matrices(self._module, wide=dtype == torch.float64)
            # Cast before they are sent: not every device knows the dtypes that they come in.
            self.product = up.to(dtype).to(device), down.to(dtype).to(device)
            if len(up) != rows:
                raise _misfit(module, (len(up), down.shape[1]), (rows,))
        self._unit = _unit(self._module, rows) if self.product is None else 1
        self._held: tuple[int, int, torch.Tensor] | None = None

    def of(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of ΔW, (stop − start, …), scale included; not to be written to.

        Raises:
            ShapeError: The factors do not fit the base.
            UnsupportedKindError: It is not known how to compute the kind.
        """
        if self.product is not None:
            up, down = self.product
            return (up[start:stop] @ down).mul_(self.scale)
        unit = self._unit or self.rows
        low, high = start // unit * unit, min(-(-stop // unit) * unit, self.rows)
        if self._held is None or self._held[0] > start or self._held[1] < stop:
            self._held = None  # what is no longer needed makes room first
            self._held = low, high, self._computed(low, high)
        low, _, found = self._held
        return found[start - low : stop - low]

    def _computed(self, low: int, high: int) -> torch.Tensor:
        whole = low == 0 and high == self.rows
        part = self._module if whole else narrowed(self._module, low, high, self.rows)
        base = None if self.base is None else self.base[low:high]
        found = kinds.delta(part, base, wide=self._dtype == torch.float64)
        if len(found) != high - low:
            raise _misfit(self._module, tuple(found.shape), (high - low,))
        return found.to(self._device)


def bare(module: Module) -> Module:
    """The module without its magnitude."""
    return module if module.magnitude is None else module._replace(magnitude=None, magnitude_axis=None)


def narrowed(module: Module, low: int, high: int, rows: int) -> Module:
    """The module of some of the rows; ``low`` and ``high`` fall on what the factors' rows stand for."""
    factors = dict(module.factors)
    for role, axis in (_axes(module) or {}).items():
        per = rows // factors[role].shape[axis]
        factors[role] = _part(factors[role], axis, low // per, high // per)
    shape = None if module.shape is None else (high - low, *module.shape[1:])
    return module._replace(factors=factors, shape=shape)


def _axes(module: Module) -> Mapping[str, int] | None:
    """Along which axis each factor follows the rows of ΔW; of experts in three axes, a row is an expert."""
    if module.kind == experts.KIND.name and experts.is_stacked(module.factors):
        return {"up": 0, "down": 0}
    return kinds.get(module.kind).row_axes(module.factors)


def _part(ref: TensorRef, axis: int, low: int, high: int) -> TensorRef:
    return from_torch(ref.name, ref.load().narrow(axis, low, high - low))


def _unit(module: Module, rows: int) -> int | None:
    """How many rows belong together, so that others can be computed without them; None where all do."""
    axes = _axes(module)
    if axes is None or oft.constraint(module) > 0:
        return None
    lengths = [module.factors[role].shape[axis] for role, axis in axes.items()]
    if any(not length or rows % length for length in lengths):
        return None
    return math.lcm(*(rows // length for length in lengths))


def _misfit(module: Module, found: tuple[int, ...], wanted: tuple[int, ...]) -> ShapeError:
    return ShapeError(
        f"{module.target}: the factors are for {found[0]} rows, the base has {wanted[0]}",
        keys=[ref.name for _, ref in module.tensors() if ref.name],
        expected="Factors for the rows that the base has were expected",
        todo="Give the base model that the adapter was trained on",
    )
