"""What is done to some rows of a base tensor, one step after the other: the compiled form of a plan's terms."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from loratools.errors import ShapeError
from loratools.ops._assemble import overlaps
from loratools.ops._changes import Span
from loratools.ops._delta_rows import DeltaRows

# What LyCORIS adds to a norm before it divides by it: the smallest float32 step. PEFT adds nothing.
EPS = 2.0**-23
# Rows are computed so many elements at a time: 2 MB of float32, which the caches hold.
ELEMENTS = 1 << 19


class Block:
    """Some rows of a tensor, outputs first, while they are computed.

    Attributes:
        start: The first of them.
        stop: The one behind the last.
        current: (stop − start, in[, kh, kw]), changed in place.
    """

    def __init__(self, start: int, stop: int, current: torch.Tensor, source: torch.Tensor) -> None:
        self.start = start
        self.stop = stop
        self.current = current
        self._source = source
        self._base: torch.Tensor | None = None

    @property
    def base(self) -> torch.Tensor:
        """The unchanged rows, of the current ones' shape and dtype; not to be written to."""
        if self._base is None:
            # A copy of its own: the result may be written to where the source lies.
            rows = self._source[self.start : self.stop]
            self._base = rows.to(self.current.device, self.current.dtype, copy=True)
        return self._base


class Step(Protocol):
    """One change."""

    def apply(self, block: Block) -> None:
        """Change the block's rows."""


class Product(NamedTuple):
    """Adds factor · up · down, never built.

    Attributes:
        up: (rows of the module, rank).
        down: (rank, in · kh · kw).
        factor: Strength and scale.
        spans: Which rows go where.
    """

    up: torch.Tensor
    down: torch.Tensor
    factor: float
    spans: tuple[Span, ...]

    def apply(self, block: Block) -> None:
        """Change the block's rows."""
        matrix = block.current if block.current.dim() == 2 else block.current.view(len(block.current), -1)
        for start, stop, at in overlaps(self.spans, block.start, block.stop):
            matrix[at : at + stop - start].addmm_(self.up[start:stop], self.down, alpha=self.factor)


class Addition(NamedTuple):
    """Adds strength · ΔW of any kind."""

    delta: DeltaRows
    strength: float
    spans: tuple[Span, ...]

    def apply(self, block: Block) -> None:
        """Change the block's rows."""
        for start, stop, at in overlaps(self.spans, block.start, block.stop):
            rows = block.current[at : at + stop - start]
            rows.add_(self.delta.of(start, stop).reshape(rows.shape), alpha=self.strength)


class Values(NamedTuple):
    """Adds numbers to a vector.

    Attributes:
        values: (rows of the module,), strength and scale included.
        spans: Which go where.
    """

    values: torch.Tensor
    spans: tuple[Span, ...]

    def apply(self, block: Block) -> None:
        """Change the block's rows."""
        for start, stop, at in overlaps(self.spans, block.start, block.stop):
            rows = block.current[at : at + stop - start]
            rows += self.values[start:stop].reshape(rows.shape)


class Decomposition(NamedTuple):
    """DoRA: m / ‖W + ΔW‖ · (W + ΔW), W being the base without other adapters.

    Attributes:
        delta: Rows of ΔW without the magnitude.
        magnitude: m, of a shape that broadcasts over the module's rows.
        along: Norms per input, of the same shape; None where they are per row and those at hand suffice.
        strength: What the user multiplies by.
        inside: PEFT's rule, by which the strength multiplies ΔW within the norm, and what other adapters have made of
            the rows is scaled along: m / ‖W + s·ΔW‖ · (current + s·ΔW). Else the whole change is multiplied, as
            ComfyUI and LyCORIS do: current + s·(m / (‖W + ΔW‖ + ε) · (W + ΔW) − W).
        spans: Which rows go where.
    """

    delta: DeltaRows
    magnitude: torch.Tensor
    along: torch.Tensor | None
    strength: float
    inside: bool
    spans: tuple[Span, ...]

    def apply(self, block: Block) -> None:
        """Change the block's rows."""
        for start, stop, at in overlaps(self.spans, block.start, block.stop):
            rows, base = block.current[at : at + stop - start], block.base[at : at + stop - start]
            change = self.delta.of(start, stop).reshape(rows.shape)
            if self.inside:
                change = change * self.strength
            whole = base + change
            if self.along is None:
                norm = row_norms(whole)
                ratio = self.magnitude[start:stop] / (norm if self.inside else norm + EPS)
            else:
                ratio = self.magnitude / (self.along if self.inside else self.along + EPS)
            if self.inside:
                rows.add_(change).mul_(ratio)
            else:
                rows.add_(whole.mul_(ratio).sub_(base), alpha=self.strength)


class Replacement(NamedTuple):
    """Goes from the current values to others: all of the way at strength 1.

    Attributes:
        values: Of the tensor's shape, outputs first, in any dtype.
        strength: The share of the way.
        added: Whether another adapter has changed the tensor: then strength · (values − base) is added to that, so
            that no adapter undoes what another does and their order does not matter.
    """

    values: torch.Tensor
    strength: float
    added: bool = False

    def apply(self, block: Block) -> None:
        """Change the block's rows."""
        values = self.values[block.start : block.stop]
        if self.added:
            add_difference(block.current, values, block.base, self.strength)
        else:
            toward(block.current, values, self.strength)


class Exchange(NamedTuple):
    """Goes to other values in some rows of the tensor as it is stored.

    Attributes:
        values: (places, …), as stored.
        places: Which stored rows they are.
        strength: The share of the way.
        across: Whether stored rows are columns here: the tensor is stored as (in, out).
        added: As in ``Replacement``.
    """

    values: torch.Tensor
    places: tuple[int, ...]
    strength: float
    across: bool
    added: bool = False

    def apply(self, block: Block) -> None:
        """Change the block's rows."""
        for number, place in enumerate(self.places):
            if self.across:
                at: tuple[slice | int, ...] = (slice(None), place)
                values = self.values[number, block.start : block.stop]
            elif block.start <= place < block.stop:
                at, values = (place - block.start,), self.values[number]
            else:
                continue
            if self.added:
                add_difference(block.current[at], values, block.base[at], self.strength)
            else:
                toward(block.current[at], values, self.strength)


def toward(current: torch.Tensor, values: torch.Tensor, share: float) -> None:
    """Change ``current`` in place by a share of its distance from ``values``."""
    if share == 1.0:
        current.copy_(values)
    else:
        current.lerp_(values.to(current.device, current.dtype), share)


def add_difference(current: torch.Tensor, values: torch.Tensor, base: torch.Tensor, factor: float) -> None:
    """Add factor · (values − base) to ``current`` in place."""
    current.add_(values.to(current.device, current.dtype) - base, alpha=factor)


def row_norms(matrix: torch.Tensor) -> torch.Tensor:
    """‖row‖ of each row, with axes of length 1 for the others."""
    found: torch.Tensor = torch.linalg.vector_norm(matrix, dim=tuple(range(1, matrix.dim())), keepdim=True)
    return found


def input_norms(delta: DeltaRows, base: torch.Tensor, factor: float, like: torch.Tensor) -> torch.Tensor:
    """‖column‖ of W + factor · ΔW over all its rows, (1, in[, 1, 1]).

    Args:
        delta: Rows of ΔW.
        base: W, all rows.
        factor: Of ΔW.
        like: Has the dtype and device to compute in.
    """
    total: torch.Tensor | None = None
    step = max(1, ELEMENTS // max(1, base[:1].numel()))
    for start in range(0, len(base), step):
        rows = base[start : start + step].to(like.device, like.dtype)
        whole = torch.add(rows, delta.of(start, start + len(rows)).reshape(rows.shape), alpha=factor)
        squares = whole.square_().sum(dim=(0, *range(2, whole.dim())), keepdim=True)
        total = squares if total is None else total.add_(squares)
    if total is None:
        raise ShapeError("a weight without rows has no norms", expected="At least one row was expected")
    return total.sqrt_()
