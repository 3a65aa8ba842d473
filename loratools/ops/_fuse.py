"""Modules of parts of a weight as one: exact, at one rank where they share a factor, else at the sum of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratools import kinds
from loratools.errors import ShapeError, UnsupportedKindError
from loratools.model import Module, Target
from loratools.ops import _bits, _scale, files
from loratools.ops._rows import CORES, a_name, flat, row_axes, settled
from loratools.tensors import TensorRef

# Factors that leave a weight as it is by the identity or by ones, not by zeros.
_NOT_ZERO = frozenset({"oft_diag", "rescale"})


def fuse(parts: Sequence[Module], target: Target, of: int) -> tuple[Module, bool]:
    """Modules of several parts of a weight as one, zero where there is no part.

    Args:
        parts: Of one kind; their rows do not overlap, and lie in the target's.
        target: The piece that they make up.
        of: How many shares of rows are counted in.

    Returns:
        The module, and whether values were computed to bring the parts to one scale or dtype.

    Raises:
        ShapeError: The parts' inputs differ.
        UnsupportedKindError: The kind cannot be fused, or the parts differ in what they would share.
    """
    first = parts[0]
    axes = _checked(parts, target, of)
    alike, rounded = _scale.alike(parts)
    asked = _bits.units(target.rows, of)
    if sum(len(_bits.units(part.target.rows, of)) for part in parts) < len(asked):
        _refuse_missing(parts, axes, target)
    shares = [[asked.index(unit) for unit in _bits.units(part.target.rows, of)] for part in parts]
    factors = _shared(alike, axes, target)
    products, rank = _products(alike, shares, axes, len(asked))
    factors |= products
    for role, axis in axes.items():
        if role not in factors:
            blocks = [
                _bits.Block(part.factors[role], share) for part, share in zip(alike, shares, strict=True)
            ]
            factors[role] = _bits.assembled(blocks, axis, len(asked))
    magnitude = _fused_magnitude(alike, shares, len(asked), target)
    rows = (first.shape or (0,))[0] // len(shares[0]) * len(asked)
    module = alike[0]._replace(
        target=target,
        factors={role: factors[role] for role in first.factors},
        rank=rank,
        shape=(rows, *first.shape[1:]) if first.shape else None,
        magnitude=magnitude,
        alpha=first.alpha if rank == first.rank else None,
        alpha_tensor=first.alpha_tensor if rank == first.rank else None,
    )
    return settled(module), rounded


def _checked(parts: Sequence[Module], target: Target, of: int) -> Mapping[str, int]:
    """Along which axis each factor follows the weight's rows: the same in all parts.

    Raises:
        ShapeError: The parts' inputs differ, or their rows do not fall on whole shares.
        UnsupportedKindError: They are of different kinds, or of one whose rows cannot be put together.
    """
    first, keys = parts[0], [a_name(part) for part in parts]
    if any(part.kind != first.kind or part.factors.keys() != first.factors.keys() for part in parts):
        raise UnsupportedKindError(
            f"{target}: its parts are of different kinds",
            keys=keys,
            todo="Turn them into LoRA with --as lora",
        )
    if len({part.shape[1:] for part in parts if part.shape}) > 1:
        raise ShapeError(f"{target}: its parts have different inputs", keys=keys)
    axes = [row_axes(part, len(_bits.units(part.target.rows, of))) for part in parts]
    other = kinds.get(first.kind).part_axes(first.factors)
    return other if other is not None and _agree(parts, other, of) else axes[0]


def _agree(parts: Sequence[Module], axes: Mapping[str, int], of: int) -> bool:
    """Whether parts differ only in the factors that follow the rows, which fall on whole shares."""
    first = parts[0]
    return all(
        part.factors[role].shape[axes[role]] % len(_bits.units(part.target.rows, of)) == 0
        if role in axes
        else _bits.same_bits(ref, part.factors[role])
        for part in parts
        for role, ref in first.factors.items()
    )


def _refuse_missing(parts: Sequence[Module], axes: Mapping[str, int], target: Target) -> None:
    """Refuse to fuse some parts of a weight where zeros would not leave the others as they are.

    Raises:
        UnsupportedKindError: The kind's factors act on all rows, or leave them by other values than zero.
    """
    first = parts[0]
    if first.kind == "glora" or not axes or _NOT_ZERO & first.factors.keys():
        raise UnsupportedKindError(
            f"{target}: a part of this weight has no module, and {kinds.get(first.kind).title} would change it",
            keys=[a_name(part) for part in parts],
            todo="Turn it into LoRA with --as lora --base",
        )


def _products(
    parts: Sequence[Module], shares: Sequence[Sequence[int]], axes: Mapping[str, int], of: int
) -> tuple[dict[str, TensorRef], int | None]:
    """The pairs of factors of all parts: left ones as blocks, right ones below each other; and their rank."""
    pairs = kinds.get(parts[0].kind).products
    if not pairs:
        return {}, parts[0].rank
    starts, rank = _columns(parts, pairs)
    factors: dict[str, TensorRef] = {}
    for left, right in pairs:
        blocks = [
            _bits.Block(part.factors[left], share, start)
            for part, share, start in zip(parts, shares, starts, strict=True)
        ]
        factors[left] = _bits.assembled(blocks, axes[left], of, rank)
        new = [part for number, part in enumerate(parts) if starts.index(starts[number]) == number]
        factors[right] = _bits.stacked([part.factors[right] for part in new])
    return factors, rank


def _columns(parts: Sequence[Module], products: Sequence[tuple[str, str]]) -> tuple[list[int], int]:
    """Where each part's columns begin: parts with the same right factors share theirs. And how many there are."""
    starts: list[int] = []
    rank = 0
    for number, part in enumerate(parts):
        same = next((other for other in range(number) if _share(parts[other], part, products)), None)
        starts.append(rank if same is None else starts[same])
        if same is None:
            rank += part.factors[products[0][1]].shape[0]
    return starts, rank


def _share(one: Module, other: Module, products: Sequence[tuple[str, str]]) -> bool:
    return all(_bits.same_bits(one.factors[right], other.factors[right]) for _, right in products)


def _shared(parts: Sequence[Module], axes: Mapping[str, int], target: Target) -> dict[str, TensorRef]:
    """The factors that serve all rows alike, which the parts have to agree on.

    Raises:
        UnsupportedKindError: They do not.
    """
    first, keys = parts[0], [a_name(part) for part in parts]
    paired = {role for pair in kinds.get(first.kind).products for role in pair}
    shared: dict[str, TensorRef] = {}
    for role, ref in first.factors.items():
        if role in axes or role in paired:
            continue
        if not all(_bits.same_bits(ref, part.factors[role]) for part in parts[1:]):
            raise UnsupportedKindError(
                f"{target}: its parts differ in {role}, of which the fused weight has one",
                keys=keys,
                todo="Turn it into LoRA with --as lora",
            )
        shared[role] = ref
    products = kinds.get(first.kind).products
    if CORES & first.factors.keys() and any(not _share(first, part, products) for part in parts[1:]):
        raise UnsupportedKindError(
            f"{target}: parts in Tucker form cannot be fused unless they share their right factors",
            keys=keys,
            todo="Turn it into LoRA with --as lora",
        )
    return shared


def _fused_magnitude(
    parts: Sequence[Module], shares: Sequence[Sequence[int]], of: int, target: Target
) -> TensorRef | None:
    """The parts' magnitudes as one.

    Raises:
        UnsupportedKindError: A part of the weight has none: it would be that of the base weight.
    """
    if all(part.magnitude is None for part in parts):
        return None
    covered = sum(len(share) for share in shares)
    if covered < of or any(part.magnitude is None for part in parts):
        raise UnsupportedKindError(
            f"{target}: a part of this weight has no magnitude, and the whole one needs the base weight's norms",
            keys=[a_name(part) for part in parts],
            todo="Turn it into LoRA with --as lora --base",
        )
    vectors = [flat(part.magnitude) for part in parts if part.magnitude is not None]
    dtype = _scale.widest({ref.dtype for ref in vectors})
    blocks = [_bits.Block(files.cast(ref, dtype), share) for ref, share in zip(vectors, shares, strict=True)]
    return _bits.assembled(blocks, 0, of)
