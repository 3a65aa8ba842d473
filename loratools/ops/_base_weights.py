"""The weights of a base model that an adapter's modules change, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple

import torch

from loratools import archs, io
from loratools.errors import ShapeError, UnsupportedKindError
from loratools.io.base import Base, Weight, load
from loratools.model import Module, Rows, Target
from loratools.ops._base_parts import weights_of
from loratools.ops._pieces import dialects, held
from loratools.ops.align import take_rows
from loratools.tensors import DTYPES, TensorRef

_TODO = "Give the base model that the adapter was trained on"


class Weights:
    """What a base holds of an adapter's components; a context that closes the base's files.

    Threads may share one, and a copy that was pickled opens files of its own when it needs them.

    Attributes:
        base: From :func:`loratools.io.base.keys_of`.
    """

    def __init__(self, base: Base, arch: str) -> None:
        self.base = base
        self._arch = archs.get(arch)
        self._parts: dict[str, dict[str, Weight]] = {}
        self._files: dict[str, Mapping[str, TensorRef]] = {}
        self._open = ExitStack()
        self._turn = threading.Lock()

    def __reduce__(self) -> tuple[type[Weights], tuple[Base, str]]:
        return Weights, (self.base, self._arch.name)

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
        with self._turn:
            return self._of(module)

    def rows_of(self, module: Module) -> Rowed:
        """Where the rows lie that a module changes, to be loaded by whoever works on it.

        Raises:
            UnsupportedKindError: The base lacks the weight, or has it quantised.
        """
        target = module.target
        pieces = self._pieces(target)
        if pieces is None:
            raise UnsupportedKindError(
                f"{target}: {self.base.path} has no such weight",
                keys=[ref.name for ref in module.factors.values() if ref.name],
                todo=_TODO,
            )
        for weight, _ in pieces:
            _refuse_quantised(weight, module)
        return Rowed(tuple(pieces))

    def _of(self, module: Module) -> torch.Tensor:
        return _assembled(self.rows_of(module), module, self._load)

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

    def _load(self, weight: Weight) -> torch.Tensor:
        if weight.file not in self._files:
            self._files[weight.file] = self._open.enter_context(io.open_tensors(weight.file)).tensors
        return self._files[weight.file][weight.key].load()


class Rowed(NamedTuple):
    """Where the rows lie that a module changes: names and places in files, which can be sent anywhere.

    Attributes:
        pieces: The base's weights, and which rows of the whole each of them is.
    """

    pieces: tuple[tuple[Weight, Rows | None], ...]

    @property
    def bytes(self) -> int:
        """Of these weights, as stored."""
        return sum(weight.nbytes for weight, _ in self.pieces)

    def load(self, module: Module) -> torch.Tensor:
        """The rows of the base weight, as by ``Weights.of``.

        Raises:
            ShapeError: The weight is of another shape.
            LoraError: It cannot be read.
        """
        return _assembled(self, module, load)


def _assembled(rowed: Rowed, module: Module, read: Callable[[Weight], torch.Tensor]) -> torch.Tensor:
    target = module.target
    whole: torch.Tensor | None = None
    for weight, rows in rowed.pieces:
        placed = take_rows(_turned(read(weight), module), rows, target.rows, str(target))
        whole = placed if whole is None else whole + placed
    assert whole is not None
    _refuse_other_shape(module, whole)
    return whole


def _turned(loaded: torch.Tensor, module: Module) -> torch.Tensor:
    """The weight as (out, in)."""
    # Embeddings and GPT-2's Conv1D; where the adapter does not say so, their shapes may.
    said = module.shape
    turned = said is not None and tuple(loaded.shape) != said and tuple(loaded.shape) == said[::-1]
    return loaded.t() if loaded.dim() == 2 and (module.in_first or turned) else loaded


def _refuse_quantised(weight: Weight, module: Module) -> None:
    if not _readable(weight):
        raise UnsupportedKindError(
            f"{module.target}: the base holds it as {weight.dtype}, quantised",
            keys=[weight.key],
            todo="Give the base model in float32, float16 or bfloat16",
        )


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
