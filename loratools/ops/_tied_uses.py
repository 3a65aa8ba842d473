"""What adapters do to an output head that has no tensor of its own, and to its use of the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loratools.errors import ShapeError, UnsupportedKindError
from loratools.io.base import Base, Weight
from loratools.model import Adapter, Module
from loratools.ops import _replaced
from loratools.ops._changes import Piece, Term
from loratools.ops._terms import INSIDE, needs_base
from loratools.ops._tied_names import Pair
from loratools.tensors import TensorRef

_SLICE = 1 << 20  # bytes


class Use(NamedTuple):
    """What happens to the head's use of an embedding.

    Attributes:
        terms: In the order of the adapters.
        own: Names, as in ``Plan.missing``, of what adapters hold for the head itself, by adapter.
        matched: How many modules of each adapter these are.
    """

    terms: tuple[Term, ...]
    own: tuple[frozenset[str], ...]
    matched: tuple[int, ...]


def use_of(
    base: Base, pair: Pair, inputs: Sequence[Term], adapters: Sequence[Adapter], strengths: Sequence[float]
) -> Use:
    """What all adapters do to the head: what they hold for it, or what they do to both uses."""
    terms: list[Term] = []
    own: list[frozenset[str]] = []
    matched: list[int] = []

    def find(_: str, key: str) -> tuple[str, Weight] | None:
        return (pair.part, pair.weight) if key == pair.key else None

    names = {*_replaced.wrapped(pair.head)}
    for position, (adapter, strength) in enumerate(zip(adapters, strengths, strict=True)):
        modules = [module for target, module in adapter.modules.items() if target.path in names]
        saved = [term for _, _, term in _replaced.terms(adapter, position, strength, base, find)[0]]
        held = saved + [_term(module, adapter, position, strength, pair, saved) for module in modules]
        theirs = [term for term in inputs if term.adapter == position]
        terms.extend(_of_head(theirs, held, ensured=bool(adapter.config.get("ensure_weight_tying"))))
        keys = [term.tensor.name for term in saved if term.tensor is not None]
        own.append(frozenset((*keys, *(str(module.target) for module in modules))))
        matched.append(len(modules))
    return Use(tuple(terms), tuple(own), tuple(matched))


def _of_head(inputs: list[Term], held: list[Term], *, ensured: bool) -> list[Term]:
    """What one adapter does to the head, of what it does to the inputs and what it holds for the head."""
    if (ensured and inputs) or same_values(inputs, held):
        return inputs
    if held:
        return held
    return [term for term in inputs if is_shared(term)]


def is_shared(term: Term) -> bool:
    """Whether a change of the embedding is one of the head too: trained tokens, and a vocabulary resized before."""
    return term.role == "rows" or _replaced.is_base_copy(term)


def _term(
    module: Module, adapter: Adapter, position: int, strength: float, pair: Pair, saved: Sequence[Term]
) -> Term:
    """What a module of the head does to its copy of the embedding."""
    shapes = {pair.weight.shape, *(term.tensor.shape for term in saved if term.tensor is not None)}
    keys = [ref.name for _, ref in module.tensors() if ref.name]
    if module.shape is not None and module.shape not in shapes:
        raise ShapeError(
            f"{module.target} is for {list(module.shape)}; {pair.weight.key}, which it is tied to, is "
            f"{list(pair.weight.shape)}",
            path=adapter.path or None,
            keys=keys,
            expected="One shape was expected",
            todo="Give the base model that the adapter was trained on",
        )
    if {"up_bias", "diff_b"} & module.factors.keys():
        raise UnsupportedKindError(
            f"{module.target} changes a bias, and a head that is tied to {pair.weight.key} has none",
            path=adapter.path or None,
            keys=keys,
            todo="Give the base model that the adapter was trained on",
        )
    spans = ((0, (module.shape or pair.weight.shape)[0], 0),)
    piece = Piece(pair.weight, spans)
    pieces = (piece,) if needs_base(module) else ()
    inside = module.magnitude is not None and adapter.layout.name in INSIDE
    return Term(position, strength, "weight", module, spans, pieces=pieces, inside=inside)


def are(one: Sequence[Term], other: Sequence[Term]) -> bool:
    """Whether two tensors get the very same terms."""
    return len(one) == len(other) and all(left is right for left, right in zip(one, other, strict=True))


def same_values(one: Sequence[Term], other: Sequence[Term]) -> bool:
    """Whether two tensors become the same: PEFT saves tied modules twice."""
    return bool(one) and len(one) == len(other) and all(map(_equal, one, other))


def _equal(one: Term, other: Term) -> bool:
    if (one.adapter, one.strength, one.role, one.places) != (
        other.adapter,
        other.strength,
        other.role,
        other.places,
    ):
        return False
    if one.tensor is None or other.tensor is None:
        return one is other
    return _same_bytes(one.tensor, other.tensor)


def _same_bytes(one: TensorRef, other: TensorRef) -> bool:
    if (one.stored_shape, one.dtype, one.transposed) != (other.stored_shape, other.dtype, other.transposed):
        return False
    left, right = one.raw(), other.raw()
    # Slice by slice: comparing bytes is fast, comparing memoryviews is not, and neither tensor is copied whole.
    starts = range(0, left.nbytes, _SLICE)
    return all(
        bytes(left[start : start + _SLICE]) == bytes(right[start : start + _SLICE]) for start in starts
    )
