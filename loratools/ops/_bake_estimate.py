"""How long a bake will take, from copying a little and computing a few tensors."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial

from loratools.io._load import Room
from loratools.io.regions import copy_range, preallocate
from loratools.ops._bake_run import Options, job, usable
from loratools.ops._bake_shards import ShardPlan
from loratools.ops.checkpoint_results import BakeEstimate

_PROBED = 64 << 20  # bytes
_LITTLE = 4 << 10  # bytes, whose way to the disk is all waiting
_TENSORS = 8  # of all sizes, that are computed


def estimate(
    shards: Sequence[ShardPlan], options: Options, output: str, size: int, *, planning: float = 0.0
) -> BakeEstimate:
    """Seconds that a bake will take.

    The system copies while torch is imported; each of the changed tensors is computed and then written.

    Args:
        shards: Its files.
        options: How tensors are computed.
        output: Where the output will lie: its disk is probed with 64 MiB that are removed again.
        size: Of all files of tensors, in bytes.
        planning: Seconds that it took to plan it, and will again.
    """
    source = max((shard.shard.path for shard in shards), key=os.path.getsize)
    latency, copied = _copy_rate(source, output)
    started = time.perf_counter()
    import loratools.engine.local  # noqa: F401 - it brings torch, which a bake has to wait for, too

    torch = time.perf_counter() - started
    computed = _compute_rate(shards, options)
    changed = sum(change.weight.nbytes for shard in shards for change in shard.changes)
    busy = torch + changed / computed + changed / copied
    return BakeEstimate(planning + max(size / copied, busy) + latency, copied, computed)


def _copy_rate(source: str, output: str) -> tuple[float, float]:
    """Seconds that the disk takes for next to nothing, and bytes per second from the base to it beyond that."""
    latency = _copied(source, output, _LITTLE)
    size = min(_PROBED, os.path.getsize(source))
    return latency, max(1, size) / max(1e-6, _copied(source, output, size) - latency)


def _copied(source: str, output: str, size: int) -> float:
    """Seconds in which the first bytes of a file come to the output's disk."""
    size = min(size, os.path.getsize(source))
    folder = os.path.dirname(os.path.realpath(output))
    with open(source, "rb") as file, tempfile.TemporaryFile(dir=folder) as target:
        preallocate(target.fileno(), size)
        started = time.perf_counter()
        copy_range(file.fileno(), target.fileno(), 0, size, 0, path=source)
        os.fsync(target.fileno())
        return time.perf_counter() - started


def _compute_rate(shards: Sequence[ShardPlan], options: Options) -> float:
    """Bytes of weights per second, by tensors of all sizes, on as many threads as will be used."""
    from loratools.engine.local import Local
    from loratools.ops._bake_tensor import bake_tensor

    changes = sorted(
        (change for shard in shards for change in shard.changes), key=lambda change: change.weight.nbytes
    )
    if not changes:
        return float("inf")
    count = min(_TENSORS, len(changes))
    chosen = [changes[(2 * number + 1) * len(changes) // (2 * count)] for number in range(count)]
    ready = usable(options)
    jobs = [job(change, ready) for change in chosen]
    bake = partial(bake_tensor, room=Room())
    bake(jobs[0])  # the first of its kind prepares threads and kernels
    started = time.perf_counter()
    for _ in Local(options.threads).run(bake, jobs):
        pass
    return sum(change.weight.nbytes for change in chosen) / max(1e-6, time.perf_counter() - started)
