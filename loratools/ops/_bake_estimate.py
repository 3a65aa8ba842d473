"""How long a bake will take, from copying a little and computing one tensor."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence

from loratools.ops._bake_run import Options, job, usable
from loratools.ops._bake_shards import ShardPlan
from loratools.ops.checkpoint_results import BakeEstimate

_PROBED = 64 << 20  # bytes
_START = 2.0  # seconds until torch is imported and the first tensor is begun


def estimate(shards: Sequence[ShardPlan], options: Options, output: str, size: int) -> BakeEstimate:
    """Seconds that a bake will take.

    Args:
        shards: Its files.
        options: How tensors are computed.
        output: Where the output will lie: its disk is probed with 64 MiB that are removed again.
        size: Of all files of tensors, in bytes.
    """
    copied = _copy_rate(max((shard.shard.path for shard in shards), key=os.path.getsize), output)
    computed = _compute_rate(shards, options)
    changed = sum(change.weight.nbytes for shard in shards for change in shard.changes)
    seconds = max(size / copied, _START + changed / computed)
    return BakeEstimate(seconds, copied, computed)


def _copy_rate(source: str, output: str) -> float:
    """Bytes per second from the base to the output's disk, flushed."""
    folder = os.path.dirname(os.path.realpath(output))
    with open(source, "rb") as file, tempfile.TemporaryFile(dir=folder) as target:
        started = time.perf_counter()
        data = file.read(_PROBED)
        target.write(data)
        target.flush()
        os.fsync(target.fileno())
        return max(1, len(data)) / max(1e-6, time.perf_counter() - started)


def _compute_rate(shards: Sequence[ShardPlan], options: Options) -> float:
    """Bytes of weights per second, by the tensor of middle size, on as many threads as will be used."""
    from loratools.engine.local import Local, default_threads
    from loratools.ops._bake_tensor import bake_tensor

    changes = sorted(
        (change for shard in shards for change in shard.changes), key=lambda change: change.weight.nbytes
    )
    if not changes:
        return float("inf")
    middle = job(changes[len(changes) // 2], usable(options))
    count = options.threads or default_threads()
    bake_tensor(middle)  # the first of its kind prepares threads and kernels
    started = time.perf_counter()
    for _ in Local(count).run(bake_tensor, [middle] * count):
        pass
    return count * middle.change.weight.nbytes / max(1e-6, time.perf_counter() - started)
