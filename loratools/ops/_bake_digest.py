"""What an interrupted bake was of, so that only the same one is resumed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from loratools.io.base import Base
from loratools.model import Adapter
from loratools.ops._bake_run import Options
from loratools.ops._changes import Plan


def digest(base: Base, adapters: Sequence[Adapter], plan: Plan, options: Options) -> str:
    """A digest of everything that decides the output's bytes.

    Of the base's files, size and time of change count, since reading them takes as long as the bake; of adapters, the
    content.

    Args:
        base: The checkpoint.
        adapters: The adapters.
        plan: What they change, with their strengths.
        options: How tensors are computed.
    """
    found = hashlib.sha256()

    def add(*values: object) -> None:
        found.update(("\\0".join(map(str, values)) + "\\n").encode())

    for shard in base.shards:
        status = os.stat(shard.path)
        add(os.path.realpath(shard.path), shard.name, status.st_size, status.st_mtime_ns)
    for adapter in adapters:
        for module in adapter.modules.values():
            add(module.target, module.kind, module.scale, module.variant)
            for role, ref in module.tensors():
                add(role, ref.dtype, ref.shape)
                found.update(ref.raw())
        for key, ref in adapter.extras.items():
            add(key, ref.dtype, ref.shape)
            found.update(ref.raw())
    for change in plan.changes:
        add(change.part, change.weight.key)
        for term in change.terms:
            add(term.adapter, term.strength, term.role, term.spans, term.inside)
    for added in plan.added:
        add(added.part, added.key, added.copied.key)
    add(*options._replace(threads=None))
    return found.hexdigest()
