"""What an interrupted bake was of, so that only the same one is gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools import __version__
from loratools.io import storage
from loratools.io.base import Base, Shard
from loratools.io.work_folder import Identity
from loratools.model import Adapter
from loratools.ops import _identity_of
from loratools.ops._bake_run import Options
from loratools.ops._bake_shards import ShardPlan
from loratools.ops._changes import Plan

if TYPE_CHECKING:
    from loratools.engine import Engine


def identity(
    base: Base,
    adapters: Sequence[Adapter],
    plan: Plan,
    shards: Sequence[ShardPlan],
    options: Options,
    engine: Engine | None = None,
) -> Identity:
    """Everything that decides the output's bytes.

    Of the base's files, size, time of change and header count, since reading them takes as long as the bake; of
    adapters, the content.

    Args:
        base: The checkpoint.
        adapters: The adapters.
        plan: What they change, with their strengths.
        shards: How each file is written.
        options: How tensors are computed.
        engine: Where they are computed; None for this machine's threads.

    Raises:
        LoraError: An adapter's tensors cannot be read any more.
    """
    inputs = {f"base {shard.name}": _file(base, shard) for shard in base.shards}
    inputs |= {f"adapter {number + 1}": _adapter(adapter) for number, adapter in enumerate(adapters)}
    found = hashlib.sha256()
    for shard in shards:
        _add(found, shard.name, shard.mode, sorted(shard.metadata.items()), sorted(shard.dropped))
    for change in plan.changes:
        _add(found, change.part, change.weight.key)
        for term in change.terms:
            _add(
                found,
                term.adapter,
                term.strength,
                term.role,
                term.spans,
                term.inside,
                term.turned,
                term.places,
            )
    for added in plan.added:
        _add(found, added.part, added.key, added.copied.key)
    strengths = {term.adapter: term.strength for change in plan.changes for term in change.terms}
    return Identity(
        "bake",
        inputs,
        {
            "weights": [strengths.get(number, 0.0) for number in range(len(adapters))],
            "precise": options.precise,
            "rounding": options.rounding,
            "seed": options.seed,
            "dtype": options.store or "keep",
            "device": _identity_of.computed_on(options.device, engine),
            "tensors": found.hexdigest(),
            "version": __version__,
        },
    )


def _file(base: Base, shard: Shard) -> str:
    found = hashlib.sha256()
    weights = base.parts[shard.part]
    for key in shard.keys:
        if key in weights:
            _add(found, key, weights[key].shape, weights[key].dtype, weights[key].start)
    return f"{storage.tag(shard.path)} {found.hexdigest()}"


def _adapter(adapter: Adapter) -> str:
    found = hashlib.sha256()
    for module in adapter.modules.values():
        _add(found, module.target, module.kind, module.scale, module.variant)
        for role, ref in module.tensors():
            _add(found, role, ref.dtype, ref.shape)
            found.update(ref.raw())
    for key, ref in adapter.extras.items():
        _add(found, key, ref.dtype, ref.shape)
        found.update(ref.raw())
    return found.hexdigest()


def _add(found: hashlib._Hash, *values: object) -> None:
    found.update(("\0".join(map(str, values)) + "\n").encode())
