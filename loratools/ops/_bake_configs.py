"""What beside the tensors has to be said anew in a baked model's folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from loratools.io import storage
from loratools.io.base import Base
from loratools.io.model_folder import true_index
from loratools.ops._bake_shards import ShardPlan
from loratools.ops._changes import Plan
from loratools.tensors import nbytes


def write_configs(
    base: Base,
    files: Sequence[ShardPlan],
    plan: Plan,
    store: str | None,
    write_json: Callable[[str, object], None],
) -> None:
    """Write the index of each part, true to what was written, and configurations that say something else now.

    Args:
        base: The checkpoint.
        files: What was written.
        plan: What changed.
        store: The store dtype asked for, or None for the base's own.
        write_json: Takes a name and a value.
    """
    for part, index in base.indices.items():
        shards = [shard for shard in files if shard.shard.part == part]
        folder = os.path.dirname(index)
        weight_map: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for shard in shards:
            for key, kind, shape in shard.sizes(store):
                weight_map[key] = os.path.relpath(shard.name, folder or ".").replace(os.sep, "/")
                sizes[key] = nbytes(shape, kind)
        write_json(index, true_index(storage.below(base.folder, index), weight_map, sizes))
    for part, said in base.configs.items():
        changed = {**said, **plan.config.get(part, {})}
        if store is not None and any(weight.dtype.startswith("F8_") for weight in base.parts[part].values()):
            # The weights are no longer float8.
            changed.pop("quantization_config", None)
        if changed != said:
            write_json(f"{part}/config.json" if part else "config.json", changed)
