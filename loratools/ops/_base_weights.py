"""The weights of a base model that an adapter's modules change, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType

import torch

from loratools import archs, io
from loratools.errors import ShapeError, UnsupportedKindError
from loratools.io.base import Base, Weight
from loratools.model import Module, Rows, Target
from loratools.ops._base_parts import weights_of
from loratools.ops._pieces import dialects, held
from loratools.ops.align import take_rows
from loratools.tensors import DTYPES, TensorRef

_TODO = "Give the base model that the adapter was trained on"


class Weights:
    """What a base holds of an adapter's components; a context that closes the base's files.

    Attributes:
        base: From :func:`loratools.io.base.keys_of`.
    """

    def __init__(self, base: Base, arch: str) -> None:
        self.base = base
        self._arch = archs.get(arch)
        self._parts: dict[str, dict[str, Weight]] = {}
        self._files: dict[str, Mapping[str, TensorRef]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def of(self, module: Module) -> torch.Tensor:
        """The rows of the base weight that a module changes, (out, in[, kh, kw]) in the base's dtype.

        Raises:
            UnsupportedKindError: The base lacks the weight, or has it quantised.
            ShapeError: It is of another shape.
        """
        target = module.target
        pieces = self._pieces(target)
        if pieces is None:
            raise UnsupportedKindError(
                f"{target}: {self.base.path} has no such weight",
                keys=[ref.name for ref in module.factors.values() if ref.name],
                todo=_TODO,
            )
        whole: torch.Tensor | None = None
        for weight, rows in pieces:
            placed = take_rows(self._load(weight, module), rows, target.rows, str(target))
            whole = placed if whole is None else whole + placed
        assert whole is not None
        _refuse_other_shape(module, whole)
        return whole

    def shape_of(self, module: Module) -> tuple[int, ...] | None:
        """The shape of what a module changes as the base has it, or None where it does not tell."""
        pieces = self._pieces(module.target)
        if pieces is None or module.in_first or any(not _readable(weight) for weight, _ in pieces):
            return None
        first, rows = pieces[0]
        share = first.shape[0] // (rows.shares if rows else 1)
        wanted = module.target.rows or Rows(((0, 1),), 1)
        return (share * (rows.of if rows else 1) * wanted.shares // wanted.of, *first.shape[1:])

    def _pieces(self, target: Target) -> list[tuple[Weight, Rows | None]] | None:
        """The base's weights that hold a target's rows, and which rows each is; None if it lacks any."""
        if target.component not in self._parts:
            self._parts[target.component] = weights_of(self._arch.name, target.component, self.base)
        part = self._parts[target.component]
        row = archs.component(self._arch.name, target.component)
        table = row.table if row is not None else None
        if target.path in part:
            return [(part[target.path], None)]
        order = dialects(table, part) if table is not None else ()
        found = held(table, part, target, order)
        return None if found is None else [(part[each.path], each.rows) for each in found]

    def _load(self, weight: Weight, module: Module) -> torch.Tensor:
        if not _readable(weight):
            raise UnsupportedKindError(
                f"{module.target}: the base holds it as {weight.dtype}, quantised",
                keys=[weight.key],
                todo="Give the base model in float32, float16 or bfloat16",
            )
        if weight.file not in self._files:
            self._files[weight.file] = self._open.enter_context(io.open_tensors(weight.file)).tensors
        loaded = self._files[weight.file][weight.key].load()
        # Embeddings and GPT-2's Conv1D; where the adapter does not say so, their shapes may.
        said = module.shape
        turned = said is not None and tuple(loaded.shape) != said and tuple(loaded.shape) == said[::-1]
        return loaded.t() if loaded.dim() == 2 and (module.in_first or turned) else loaded


def _readable(weight: Weight) -> bool:
    """Whether it is stored as numbers, not as some quantisation's codes."""
    return DTYPES[weight.dtype].floating and DTYPES[weight.dtype].bits >= 16


def _refuse_other_shape(module: Module, weight: torch.Tensor) -> None:
    said = module.shape
    if said is not None and weight.shape[:1] != said[:1]:
        raise ShapeError(
            f"{module.target}: the adapter's weight is {list(said)}, the base's {list(weight.shape)}",
            keys=[ref.name for ref in module.factors.values() if ref.name],
            expected="Rows of the same count were expected",
            todo=_TODO,
        )
