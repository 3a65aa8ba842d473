"""Which tensors of two checkpoints are to be compared, and what speaks against comparing them: from headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from loratools.errors import ArchitectureError, NameResolutionError, ShapeError
from loratools.io.base import Weight
from loratools.ops._extract_options import Options, check_components
from loratools.ops._extract_pairs import (
    EMBEDDING,
    Pair,
    Stored,
    Weights,
    by_weight,
    common_rows,
    counterpart,
    plain,
)
from loratools.ops._extract_side import Side, refuse_quantised
from loratools.tensors import DTYPES

_UNKNOWN = "unknown"
_CONV = 4
# Channels of the latents, and those that an inpainting or an editing model has beside them.
_LATENTS = 4
_WITH_MASK = (8, 9)


class Alone(NamedTuple):
    """A small tensor that one checkpoint has and the other has not."""

    weight: Weight
    why: str


class Compared(NamedTuple):
    """What there is to compare.

    Attributes:
        arch: The architecture's name.
        pairs: Tensors of known components, in the base's order.
        others: Tensors of no known component (a VAE's, buffers) with the same name in both.
        alone: Small tensors of known components that only one of both has.
        notes: What the caller should know.
    """

    arch: str
    pairs: tuple[Pair, ...]
    others: tuple[tuple[Weight, Weight], ...]
    alone: tuple[Alone, ...]
    notes: tuple[str, ...]


def compare(base: Side, tuned: Side, options: Options) -> Compared:
    """Pair the tensors of two checkpoints.

    Args:
        base: Decides the names and the grain.
        tuned: May be sharded, fused and named otherwise.
        options: Which weights are wanted.

    Raises:
        ArchitectureError: They are of different architectures.
        OptionError: The base lacks a component that is asked for.
        NameResolutionError: A matrix is in one of them only.
        ShapeError: A matrix has another shape in each, and is no resized vocabulary.
        UnsupportedKindError: Weights are quantised in a way that is not computed with.
    """
    _refuse_strangers(base, tuned)
    check_components(options.components, {each.target.component for each in base.stored})
    wanted, skipped = _wanted(base.stored, options)
    theirs, _ = _wanted(tuned.stored, options)
    refuse_quantised(base, wanted)
    refuse_quantised(tuned, theirs)
    weights = by_weight(theirs)
    pairs, missing, misfits = _paired(wanted, weights)
    own = by_weight(wanted)
    extra = [each for each in theirs if (each.target.component, each.target.path, each.leaf) not in own]
    _refuse_alone(missing, base, tuned)
    _refuse_alone(extra, tuned, base)
    _refuse_misfits(misfits, base, tuned)
    others, notes = _others(base, tuned)
    if skipped:
        notes.insert(0, f"{skipped} tensors were not chosen, and not compared")
    alone = [_alone(each, tuned.base.path) for each in missing]
    alone += [_alone(each, base.base.path) for each in extra]
    return Compared(base.arch, tuple(pairs), tuple(others), tuple(alone), tuple(notes))


def _wanted(stored: Sequence[Stored], options: Options) -> tuple[list[Stored], int]:
    """The tensors that are asked for, and how many are not."""
    components = options.components
    found = [
        each
        for each in stored
        if (components is None or each.target.component in components) and options.chosen(*each.names)
    ]
    return found, len(stored) - len(found)


def _paired(
    wanted: Iterable[Stored], weights: Weights
) -> tuple[list[Pair], list[Stored], list[tuple[Stored, Stored]]]:
    """Pairs, tensors without a counterpart, and those whose counterpart has another shape."""
    pairs: list[Pair] = []
    missing: list[Stored] = []
    misfits: list[tuple[Stored, Stored]] = []
    for each in wanted:
        found = counterpart(each, weights)
        if found is None:
            missing.append(each)
        elif isinstance(found, Stored):
            misfits.append((each, found))
        else:
            pairs.append(Pair(each, found, each.shape[0] if each.shape else 1))
    sizes = {
        (own.shape[0], other.shape[0])
        for own, other in misfits
        if own.role == EMBEDDING and own.shape and other.shape
    }
    resized = [pair for pair in misfits if _is_resized(*pair, sizes)]
    pairs += [common_rows(*pair) for pair in resized]
    return _in_order(pairs, wanted), missing, [pair for pair in misfits if pair not in resized]


def _in_order(pairs: Iterable[Pair], wanted: Iterable[Stored]) -> list[Pair]:
    found = {id(pair.stored): pair for pair in pairs}
    return [found[id(each)] for each in wanted if id(each) in found]


def _is_resized(own: Stored, other: Stored, sizes: set[tuple[int, int]]) -> bool:
    """Whether the two differ in their vocabulary alone: an embedding, or an output head of the same sizes."""
    if not own.shape or not other.shape or plain(own.shape)[1:] != plain(other.shape)[1:]:
        return False
    return own.role == EMBEDDING or (own.shape[0], other.shape[0]) in sizes


def _refuse_strangers(base: Side, tuned: Side) -> None:
    known = _UNKNOWN not in (base.arch, tuned.arch)
    if known and base.arch != tuned.arch:
        raise ArchitectureError(
            f"this is {tuned.arch}, and {base.base.path} is {base.arch}",
            path=tuned.base.path,
            expected="Two checkpoints of one architecture were expected",
            todo="Give the base that the checkpoint was tuned from, or the architecture with --arch",
        )
    ours = {(each.target.component, each.target.path) for each in base.stored if not each.is_small}
    theirs = {(each.target.component, each.target.path) for each in tuned.stored if not each.is_small}
    if not ours & theirs:
        raise ArchitectureError(
            f"none of the {len(theirs)} matrices of this is in {base.base.path}",
            path=tuned.base.path,
            keys=[each.weight.key for each in tuned.stored if not each.is_small],
            expected=f"Names like those of the base were expected: {_first(base.stored)}",
            todo="Give the base that the checkpoint was tuned from, or the architecture with --arch",
        )


def _first(stored: Sequence[Stored]) -> str:
    return next((each.weight.key for each in stored if not each.is_small), "none")


def _refuse_alone(alone: Sequence[Stored], holder: Side, other: Side) -> None:
    """Refuse matrices that only one checkpoint has: what was tuned in them cannot be told."""
    found = [each for each in alone if not each.is_small]
    if not found:
        return
    there = {each.target.component for each in other.stored}
    absent = sorted({each.target.component for each in found} - there)
    whole = f"it has no {' and no '.join(absent)} at all" if absent else ""
    rest = sorted(there)
    raise NameResolutionError(
        f"{len(found)} matrices of {holder.base.path} are not in it" + (f": {whole}" if whole else ""),
        path=other.base.path,
        keys=[each.weight.key for each in found],
        expected="Every matrix of the components compared was expected in both checkpoints",
        todo=f"Compare what both have with --components {','.join(rest)}"
        if absent
        else "Leave them out with --exclude",
    )


def _refuse_misfits(misfits: Sequence[tuple[Stored, Stored]], base: Side, tuned: Side) -> None:
    if not misfits:
        return
    own, other = next((pair for pair in misfits if _reads_a_mask(*pair)), misfits[0])
    expected = "The same shapes were expected, but for the rows of a vocabulary"
    todo = "Give the base that the checkpoint was tuned from, or leave them out with --exclude"
    if _reads_a_mask(own, other):
        wide = tuned if other.shape[1] > own.shape[1] else base
        expected = (
            f"{wide.base.path} is an inpainting or editing model: its first convolution reads "
            f"{max(own.shape[1], other.shape[1])} channels, a mask or an image beside the latents"
        )
        todo = f"Give a base with {other.shape[1]} channels, or --exclude '{re.escape(own.target.path)}'"
    raise ShapeError(
        f"{len(misfits)} tensors have another shape than in {base.base.path}: {own.weight.key} is "
        f"{list(other.shape)} instead of {list(own.shape)}",
        path=tuned.base.path,
        keys=[pair[0].weight.key for pair in misfits],
        expected=expected,
        todo=todo,
    )


def _reads_a_mask(own: Stored, other: Stored) -> bool:
    """Whether one reads the latents alone, and the other a mask or an image beside them."""
    if len(own.shape) != _CONV or len(other.shape) != _CONV or own.shape[0] != other.shape[0]:
        return False
    few, many = sorted((own.shape[1], other.shape[1]))
    return few == _LATENTS and many in _WITH_MASK


def _alone(stored: Stored, lacking: str) -> Alone:
    return Alone(stored.weight, f"{lacking} does not have it")


def _others(base: Side, tuned: Side) -> tuple[list[tuple[Weight, Weight]], list[str]]:
    """Tensors of no component that have one name in both, and what is to be said of the rest."""
    ours, theirs = base.others, tuned.others
    both = [
        (weight, theirs[name])
        for name, weight in ours.items()
        if name in theirs
        and weight.shape == theirs[name].shape
        and _is_data(weight)
        and _is_data(theirs[name])
    ]
    notes = []
    for side, own, its in ((base, ours, theirs), (tuned, theirs, ours)):
        only = [name for name in own if name not in its]
        if only:
            notes.append(
                f"{len(only)} tensors of no known component are in {side.base.path} only, and were not compared "
                f"(first: {own[only[0]].key})"
            )
    odd = [ours[name].key for name in ours if name in theirs and ours[name].shape != theirs[name].shape]
    if odd:
        notes.append(f"{len(odd)} tensors of no known component differ in shape (first: {odd[0]})")
    return both, notes


def _is_data(weight: Weight) -> bool:
    return bool(DTYPES[weight.dtype].torch)
