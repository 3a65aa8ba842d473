"""The weights of a base model that an adapter's modules change, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch

from loratools import archs, io
from loratools.errors import ShapeError, UnsupportedKindError
from loratools.io.base import Base, Weight
from loratools.model import Module, Rows
from loratools.ops._base_parts import weights_of
from loratools.ops.align import take_rows
from loratools.tensors import DTYPES, TensorRef

# Open files at a time: a sharded base has one tensor after another in the same few.
_OPEN = 4


class Weights:
    """What a base holds of an adapter's components.

    Attributes:
        base: From :func:`loratools.io.base.keys_of`.
    """

    def __init__(self, base: Base, arch: str) -> None:
        self.base = base
        self._arch = archs.get(arch)
        self._parts: dict[str, dict[str, Weight]] = {}

    def of(self, module: Module) -> torch.Tensor:
        """The rows of the base weight that a module changes, (out, in[, kh, kw]) in the base's dtype.

        Raises:
            UnsupportedKindError: The base lacks the weight, or has it quantised.
            ShapeError: It is of another shape.
        """
        target = module.target
        part = self._part(target.component)
        found = part.get(target.path)
        rows: torch.Tensor | None = None
        if found is not None:
            rows = take_rows(self._load(found, module), None, target.rows, str(target))
        else:
            rows = self._in_pieces(module, part)
        if rows is None:
            raise UnsupportedKindError(
                f"{target}: {self.base.path} has no such weight",
                keys=[ref.name for ref in module.factors.values()],
                todo="Give the base model that the adapter was trained on",
            )
        if module.shape is not None and rows.shape[:1] != module.shape[:1]:
            raise ShapeError(
                f"{target}: the adapter's weight is {list(module.shape)}, the base's {list(rows.shape)}",
                todo="Give the base model that the adapter was trained on",
            )
        return rows

    def _part(self, component: str) -> dict[str, Weight]:
        if component not in self._parts:
            self._parts[component] = weights_of(self._arch.name, component, self.base)
        return self._parts[component]

    def _in_pieces(self, module: Module, part: Mapping[str, Weight]) -> torch.Tensor | None:
        """The weight from a base with diffusers' names, which may hold it in pieces."""
        target = module.target
        if all(each.name != target.component for each in self._arch.components):
            return None
        pieces = self._arch.pieces(target.component, target.path, "diffusers")
        whole: torch.Tensor | None = None
        for rows in pieces:
            name = self._arch.spell(target.component, target.path, rows, "diffusers") or ""
            found = part.get(name) or part.get(name.removeprefix("text_model."))
            if found is None:
                return None
            placed = _placed(self._load(found, module), rows, str(target))
            whole = placed if whole is None else whole + placed
        return take_rows(whole, None, target.rows, str(target)) if whole is not None else None

    def _load(self, weight: Weight, module: Module) -> torch.Tensor:
        if not DTYPES[weight.dtype].floating or DTYPES[weight.dtype].bits < 16:
            raise UnsupportedKindError(
                f"{module.target}: the base holds it as {weight.dtype}, quantised",
                keys=[weight.key],
                todo="Give the base model in float32, float16 or bfloat16",
            )
        loaded = _opened(weight.file)[weight.key].load()
        return loaded.t() if module.in_first and loaded.dim() == 2 else loaded


def _placed(piece: torch.Tensor, rows: Rows | None, name: str) -> torch.Tensor:
    return take_rows(piece, rows, None, name)


@lru_cache(maxsize=_OPEN)
def _opened(path: str) -> Mapping[str, TensorRef]:
    return io.open_tensors(path).tensors
