"""Writing the files of a bake: the system copies what stays, while the tensors that change are computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from loratools.errors import NonFiniteError
from loratools.io.rewrite import Computed, Copied, Restream, Rewrite
from loratools.ops._bake_shards import Cast, ShardPlan
from loratools.ops._changes import Added, Change
from loratools.ops.checkpoint_results import BakedTensor
from loratools.tensors import DTYPES, nbytes, torch_bytes

if TYPE_CHECKING:
    import torch

    from loratools.ops._bake_tensor import BakedData, BakeJob

Progress = Callable[[str, int, int], None]


class Options(NamedTuple):
    """How tensors are computed; what they are computed of is in the plan.

    Attributes:
        precise: In float64 instead of float32.
        rounding: "nearest", "stochastic" or "compensated".
        seed: Of stochastic rounding.
        device: Where to compute.
        store: The store dtype asked for, a safetensors name; None for the base's own.
        threads: How many tensors are worked on side by side; None for one per processor.
    """

    precise: bool = False
    rounding: str = "nearest"
    seed: int = 0
    device: str = "cpu"
    store: str | None = None
    threads: int | None = None


class Meter:
    """How many bytes of how many are done, over several files."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self._total = total
        self._report = report
        self._before = 0
        self._lock = threading.Lock()

    def show(self, name: str, done: int) -> None:
        """Report the bytes done of the present file."""
        if self._report is not None:
            with self._lock:
                self._report(name, min(self._before + done, self._total), self._total)

    def next_file(self, size: int) -> None:
        """A file is done."""
        self._before += size
        self.show("", 0)


class _Task(NamedTuple):
    """One piece of work on one file.

    Attributes:
        change: What to compute, or None.
        key: Where the result goes; empty where only the scales are wanted.
        scale: Where the scales go, or empty.
        cast: What to cast instead.
        added: What to copy instead.
    """

    change: Change | None = None
    key: str = ""
    scale: str = ""
    cast: Cast | None = None
    added: Added | None = None


Writer = Rewrite | Restream


def writer_for(plan: ShardPlan, path: str, store: str | None) -> Writer:
    """What writes a file; nothing is written yet."""
    if plan.mode == "restream":
        computed = plan.computed
        outputs = [
            Computed(name, dtype, shape) if name in computed else Copied(name, plan.weights[name])
            for name, dtype, shape in plan.sizes(store)
        ]
        return Restream(outputs, path, plan.metadata)
    same = dict(plan.metadata) == dict(plan.shard.metadata) or plan.mode == "copy"
    return Rewrite(plan.shard, plan.weights, path, plan.computed, metadata=None if same else plan.metadata)


def size_of(plan: ShardPlan, store: str | None) -> int:
    """Size of a file that will be written, in bytes; a new header is taken to be as long as the old."""
    if plan.mode != "restream":
        return plan.shard.size
    return sum(nbytes(shape, dtype) for _, dtype, shape in plan.sizes(store))


def write(plan: ShardPlan, writer: Writer, options: Options, meter: Meter) -> list[BakedTensor]:
    """Compute and place all tensors of one file that change; the caller finishes it.

    Args:
        plan: Of the file.
        writer: Its writer, which has begun to copy.
        options: How to compute.
        meter: Told after each tensor.

    Returns:
        What became of each tensor that adapters changed.
    """
    tasks = list(_tasks(plan))
    if not tasks:
        return []
    # Only now: while torch is imported, the copying goes on.
    from loratools.engine.local import Local

    options = usable(options)
    found = []
    for result in Local(options.threads).run(partial(_work, writer, options), tasks):
        if result is not None:
            found.append(result)
        meter.show(result.key if result is not None else "", writer.progress)
    return found


def usable(options: Options) -> Options:
    """The options with the device that "auto" means, or an error where the device is not there."""
    from loratools.ops import _device

    wide = torch_dtype("F64" if options.precise else "F32")
    return options._replace(device=_device.usable(options.device, auto="cpu", wanted=wide))


def torch_dtype(name: str) -> torch.dtype:
    """A dtype of torch by its safetensors name."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[name].torch)
    return found


def _tasks(plan: ShardPlan) -> Iterator[_Task]:
    for change in plan.changes:
        scale = change.scale.key if change.scale is not None and change.scale.key in plan.scales else ""
        yield _Task(change=change, key=change.weight.key, scale=scale)
    own = {change.weight.key for change in plan.changes}
    for key, change in plan.scales.items():
        if change.weight.key not in own:
            yield _Task(change=change, scale=key)  # its weight lies in another file
    for cast in plan.casts:
        yield _Task(cast=cast)
    for added in plan.added:
        yield _Task(change=added.change, key=added.key, added=added)


def _work(writer: Writer, options: Options, task: _Task) -> BakedTensor | None:
    if task.change is not None:
        return _baked(writer, options, task, task.change)
    if task.cast is not None:
        writer.put(task.cast.weight.key, torch_bytes(_cast(task.cast)))
    elif task.added is not None:
        from loratools.io.base import load

        copied = task.added.copied
        stored = _cast(Cast(copied, options.store)) if options.store else load(copied)
        writer.put(task.key, torch_bytes(stored))
    return None


def _baked(writer: Writer, options: Options, task: _Task, change: Change) -> BakedTensor | None:
    from loratools.io.base import load
    from loratools.ops._bake_tensor import bake_tensor

    data: BakedData = bake_tensor(job(change, options))
    if task.key:
        writer.put(task.key, torch_bytes(data.data))
    if task.scale and change.scale is not None:
        writer.put(task.scale, torch_bytes(load(change.scale) if data.scale is None else data.scale))
    return data.result if task.key else None


def job(change: Change, options: Options) -> BakeJob:
    """The work on one tensor, as plain data."""
    from loratools.ops._bake_tensor import BakeJob

    return BakeJob(
        change,
        precise=options.precise,
        rounding=options.rounding,
        seed=options.seed,
        device=options.device,
        dtype=options.store,
    )


def _cast(cast: Cast) -> torch.Tensor:
    """A tensor in another store dtype, (…) on the CPU.

    Raises:
        NonFiniteError: Its values do not fit.
    """
    from loratools.io.base import load
    from loratools.maths.float8 import dequantise

    stored = load(cast.weight)
    dtype = torch_dtype(cast.dtype)
    wide = stored if cast.scale is None else dequantise(stored, load(cast.scale))
    if wide.dtype == dtype:
        return wide
    after = wide.to(dtype)
    if not bool(after.float().isfinite().all()):
        raise NonFiniteError(
            f"values up to {float(wide.float().abs().max()):.3g} do not fit {cast.dtype}",
            path=cast.weight.file,
            keys=[cast.weight.key],
            todo="Choose --dtype bfloat16 or float32, or keep",
        )
    return after
