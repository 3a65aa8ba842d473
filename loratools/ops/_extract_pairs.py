"""Where the rows of a base's weight lie in another checkpoint, which may be fused, split or sharded otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from loratools.io.base import Weight
from loratools.model import Rows, Target
from loratools.ops._changes import Piece, Span

Shape = tuple[int, ...]

# What a stored tensor is to the module that it belongs to.
MATRIX, EMBEDDING, NORM, BARE = "matrix", "embedding", "norm", "bare"


class Stored(NamedTuple):
    """A tensor of a component as a checkpoint stores it.

    Attributes:
        target: The weight, or for a bias the weight beside it.
        leaf: "weight" (or a bare parameter), or "bias".
        role: "matrix", "embedding", "norm" or "bare".
        weight: The tensor.
        turned: Whether it is stored as (in, out).
        scale: The tensor of its float8 scales, where it has one.
    """

    target: Target
    leaf: str
    role: str
    weight: Weight
    turned: bool = False
    scale: Weight | None = None

    @property
    def shape(self) -> Shape:
        """(out, in[, kh, kw]); of an embedding (vocabulary, dim), as it is stored."""
        return self.weight.shape[::-1] if self.turned else self.weight.shape

    @property
    def names(self) -> tuple[str, str]:
        """What patterns are matched with: the architecture's name, and the checkpoint's without a network's prefix."""
        key, path = self.weight.key, self.target.path
        return str(self.target), key[key.index(path) :] if path in key else key

    @property
    def is_small(self) -> bool:
        """Whether it is a vector (or less), which has no rank to speak of."""
        return self.leaf == "bias" or self.role in (NORM, BARE) or len(self.shape) < _MATRIX

    @property
    def whole(self) -> Piece:
        """All its rows, in their order."""
        rows = self.shape[0] if self.shape else 1
        return Piece(self.weight, ((0, rows, 0),), self.turned, self.scale)


_MATRIX = 2


class Pair(NamedTuple):
    """A tensor of the base and its counterpart.

    Attributes:
        stored: The base's.
        tuned: The tensors of the other checkpoint that hold its rows.
        rows: How many of its rows both have: fewer than all where a vocabulary was resized.
        grown: How many rows the other one has beyond the base's.
    """

    stored: Stored
    tuned: tuple[Piece, ...]
    rows: int
    grown: int = 0


Weights = Mapping[tuple[str, str, str], Sequence[Stored]]


def by_weight(stored: Iterable[Stored]) -> Weights:
    """Tensors by component, path and leaf; a fused weight that is stored in parts has several."""
    found: dict[tuple[str, str, str], list[Stored]] = {}
    for each in stored:
        found.setdefault((each.target.component, each.target.path, each.leaf), []).append(each)
    return found


def counterpart(wanted: Stored, weights: Weights) -> tuple[Piece, ...] | Stored | None:
    """The pieces of another checkpoint that hold a tensor's rows.

    Returns:
        None where it lacks some of them; the one tensor of another shape where that is what it has.
    """
    target = wanted.target
    others = weights.get((target.component, target.path, wanted.leaf), ())
    alike = next((each for each in others if each.target.rows == target.rows), None)
    if alike is not None:
        return (alike.whole,) if plain(alike.shape) == plain(wanted.shape) else alike
    if not others or not wanted.shape or any(not each.shape for each in others):
        return None
    misfit = next((each for each in others if plain(each.shape)[1:] != plain(wanted.shape)[1:]), None)
    if misfit is not None:
        return misfit
    pieces = tuple(piece for each in others if (piece := _overlap(wanted, each)) is not None)
    covered = sum(stop - start for piece in pieces for start, stop, _ in piece.spans)
    return pieces if covered == wanted.shape[0] else None


def _overlap(wanted: Stored, other: Stored) -> Piece | None:
    """Which of a tensor's rows another one holds, both being parts of one fused weight."""
    own = _absolute(wanted.target.rows, wanted.shape[0])
    its = _absolute(other.target.rows, other.shape[0])
    spans: list[Span] = []
    for start, stop, at in own:
        for first, last, place in its:
            low, high = max(start, first), min(stop, last)
            if low < high:
                spans.append((at + low - start, at + high - start, place + low - first))
    return Piece(other.weight, tuple(spans), other.turned, other.scale) if spans else None


def _absolute(rows: Rows | None, count: int) -> list[Span]:
    """Rows of the fused weight, and the place in the tensor from which on they are stored."""
    if rows is None:
        return [(0, count, 0)]
    share, rest = divmod(count, rows.shares)
    if rest:
        return []
    spans, at = [], 0
    for start, stop in rows.spans:
        spans.append((start * share, stop * share, at))
        at += (stop - start) * share
    return spans


def common_rows(wanted: Stored, other: Stored) -> Pair:
    """A tensor and one that has another count of rows: those that both have."""
    rows = min(wanted.shape[0], other.shape[0])
    piece = Piece(other.weight, ((0, rows, 0),), other.turned, other.scale)
    return Pair(wanted, (piece,), rows, max(0, other.shape[0] - wanted.shape[0]))


def plain(shape: Shape) -> Shape:
    """A shape without kernels of one: a convolution of that kind and a linear layer are one matrix."""
    end = len(shape)
    while end > _MATRIX and shape[end - 1] == 1:
        end -= 1
    return shape[:end]
