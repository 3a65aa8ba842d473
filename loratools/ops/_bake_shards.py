"""What becomes of each file of a base: copied, rewritten in place of a clone, or streamed under a new header."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from loratools.errors import OptionError, UnsupportedKindError
from loratools.io.base import Base, Shard, Weight
from loratools.ops._changes import Added, Change, Plan
from loratools.tensors import DTYPES

# Digests of the tensors' bytes, which are others now.
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_TO_SAFETENSORS = "Give the output a name that ends in .safetensors"


class Cast(NamedTuple):
    """A tensor whose store dtype changes, and nothing else.

    Attributes:
        weight: The tensor.
        dtype: What it is stored in from now on.
        scale: The tensor of its float8 scales, where it has one; the result has none.
    """

    weight: Weight
    dtype: str
    scale: Weight | None = None


class ShardPlan(NamedTuple):
    """One file to be written.

    Attributes:
        shard: The base's file.
        name: Of the output, relative to the folder.
        mode: "copy" (as it is), "rewrite" (some tensors replaced where they lie) or "restream" (under a new header).
        changes: Its tensors that adapters change.
        added: Tensors that it gets.
        casts: Tensors that only change their store dtype.
        scales: Tensors of float8 scales in this file, and the change that decides them.
        metadata: Of the output.
        weights: All tensors of the file, by key, in its order.
        dropped: Keys that the output lacks: scales of what is no longer float8.
    """

    shard: Shard
    name: str
    mode: str
    changes: tuple[Change, ...]
    added: tuple[Added, ...]
    casts: tuple[Cast, ...]
    scales: Mapping[str, Change]
    metadata: Mapping[str, str]
    weights: Mapping[str, Weight]
    dropped: Collection[str] = ()

    @property
    def computed(self) -> set[str]:
        """The keys that are not copied."""
        own = {change.weight.key for change in self.changes}
        return (
            own
            | {added.key for added in self.added}
            | {cast.weight.key for cast in self.casts}
            | {*self.scales}
        )

    def sizes(self, store: str | None) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of every tensor of the output, in order.

        Args:
            store: The store dtype asked for, or None for the base's own.
        """
        changes = {change.weight.key: change for change in self.changes}
        cast = {each.weight.key for each in self.casts}
        after = _after(self.added)
        for key, weight in self.weights.items():
            if key not in self.dropped:
                dtype = (
                    store
                    if store and (key in cast or (key in changes and _castable(weight)))
                    else weight.dtype
                )
                yield key, dtype, shape_after(changes[key]) if key in changes else weight.shape
            for added in after.get(key, ()):
                yield added.key, store or added.copied.dtype, added.copied.shape


def shard_plans(
    base: Base, plan: Plan, *, container: str, store: str | None, name: str = ""
) -> list[ShardPlan]:
    """How every file of a base is written.

    Args:
        base: With its shards.
        plan: What changes.
        container: The output's: "safetensors" or "pickle".
        store: The store dtype asked for, a safetensors name, or None for the base's own.
        name: The output's own name, where it is a single file.

    Raises:
        OptionError: A pickle would need another header than the base's.
        UnsupportedKindError: A tensor of a pickle does not lie in it as plain bytes.
    """
    scales = {(change.part, change.scale.key): change for change in plan.changes if change.scale is not None}
    plans = []
    for shard in base.shards:
        weights = {key: base.parts[shard.part][key] for key in shard.keys if key in base.parts[shard.part]}
        mine = [
            change
            for change in plan.changes
            if change.part == shard.part and change.weight.file == shard.path and change.weight.key in weights
        ]
        added = [each for each in plan.added if each.part == shard.part and each.copied.file == shard.path]
        own_scales = {
            key: change for (part, key), change in scales.items() if part == shard.part and key in weights
        }
        changed = {change.weight.key for change in mine}
        casts, dropped = _casts(base, shard, weights, changed, store)
        if container != shard.container:
            casts += _scattered(weights, changed, casts)
        if store is not None:
            dropped |= own_scales.keys()
            own_scales = {}
        one = ShardPlan(
            shard=shard,
            name=shard.name if base.folder else name,
            mode="rewrite",
            changes=tuple(mine),
            added=tuple(added),
            casts=tuple(casts),
            scales=own_scales,
            metadata={key: value for key, value in shard.metadata.items() if key not in _STALE},
            weights=weights,
            dropped=dropped,
        )
        plans.append(one._replace(mode=_mode(one, container, store)))
    return plans


def shape_after(change: Change) -> tuple[int, ...]:
    """The shape of a tensor once the terms have changed it: another where all of it is replaced."""
    for term in reversed(change.terms):
        if term.role == "replace" and term.tensor is not None:
            return term.tensor.shape
    return change.weight.shape


def _after(added: Sequence[Added]) -> dict[str, list[Added]]:
    """New tensors by the key of the one that they follow."""
    found: dict[str, list[Added]] = {}
    for each in added:
        found.setdefault(each.copied.key, []).append(each)
    return found


def _castable(weight: Weight) -> bool:
    return DTYPES[weight.dtype].floating and DTYPES[weight.dtype].bits >= 8


def _casts(
    base: Base, shard: Shard, weights: Mapping[str, Weight], changed: Collection[str], store: str | None
) -> tuple[list[Cast], set[str]]:
    """The tensors that only change their store dtype, and the scales that go with it."""
    if store is None:
        return [], set()
    from loratools.ops import _quantised

    found: list[Cast] = []
    part = base.parts[shard.part]
    dropped = _quantised.markers(part) & weights.keys()
    for weight in part.values():
        scale = _quantised.scale_of(part, weight) if DTYPES[weight.dtype].bits == 8 else None
        if scale is not None and scale.key in weights:
            dropped.add(scale.key)
        if weight.key not in weights or weight.key in changed or not _castable(weight):
            continue
        if weight.dtype != store or scale is not None:
            found.append(Cast(weight, store, scale))
    return [cast for cast in found if cast.weight.key not in dropped], dropped


def _scattered(weights: Mapping[str, Weight], changed: Collection[str], casts: Sequence[Cast]) -> list[Cast]:
    """Tensors that stay as they are and do not lie in the file as plain bytes: they are loaded, not copied."""
    known = {*changed, *(cast.weight.key for cast in casts)}
    return [
        Cast(weight, weight.dtype)
        for key, weight in weights.items()
        if weight.start is None and key not in known
    ]


def _mode(plan: ShardPlan, container: str, store: str | None) -> str:
    """How a file is written.

    Raises:
        OptionError: It would need another header, which a pickle cannot get.
        UnsupportedKindError: A changed tensor of a pickle does not lie in it as plain bytes.
    """
    shaped = [change.weight.key for change in plan.changes if shape_after(change) != change.weight.shape]
    other = [added.key for added in plan.added] + shaped + [cast.weight.key for cast in plan.casts]
    other += [change.weight.key for change in plan.changes if store and change.weight.dtype != store]
    other += sorted(plan.dropped)
    if container != plan.shard.container or (other and container == "safetensors"):
        return "restream"
    if other:
        raise OptionError(
            f"{len(other)} tensors would get another shape or dtype, or are new; a pickle keeps those that it has",
            path=plan.shard.path,
            keys=other,
            todo=_TO_SAFETENSORS,
        )
    if not plan.computed:
        return "copy"
    scattered = [key for key in plan.computed if plan.weights[key].start is None]
    if scattered:
        raise UnsupportedKindError(
            "tensors that adapters change are views or compressed, and cannot be replaced where they lie",
            path=plan.shard.path,
            keys=scattered,
            todo=_TO_SAFETENSORS,
        )
    return "rewrite"
