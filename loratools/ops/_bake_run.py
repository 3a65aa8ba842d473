"""Writing the files of a bake: the system copies what stays, while the tensors that change are computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from loratools.errors import NonFiniteError
from loratools.io.base import Weight
from loratools.io.rewrite import Computed, Copied, Restream, Rewrite
from loratools.ops import _bake_records
from loratools.ops._bake_shards import Cast, ShardPlan
from loratools.ops._changes import Added, Change
from loratools.ops.checkpoint_results import BakedTensor
from loratools.tensors import DTYPES, nbytes, torch_bytes

if TYPE_CHECKING:
    import torch

    from loratools.engine import Engine
    from loratools.io._load import Room
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
        self._lock = threading.Lock()

    def show(self, name: str, done: int) -> None:
        """Report the bytes done of those that have to be written."""
        if self._report is not None:
            with self._lock:
                self._report(name, min(done, self._total), self._total)


class Task(NamedTuple):
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

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors that it makes, in the order in which it gives them."""
        if self.cast is not None:
            return (self.cast.weight.key,)
        return tuple(key for key in (self.key, self.scale) if key)

    @property
    def source(self) -> Weight:
        """The tensor of the base that it begins with."""
        if self.cast is not None:
            return self.cast.weight
        if self.added is not None:
            return self.added.copied
        assert self.change is not None
        return self.change.weight

    @property
    def name(self) -> str:
        """In the journal: the same in every run of the same output."""
        return f"tensor {self.keys[0]}"

    @property
    def told(self) -> str:
        """The key by which its result is told, or empty where it has none."""
        return self.change.weight.key if self.change is not None and self.key else ""


class Done(NamedTuple):
    """What writing the files of a bake gave.

    Attributes:
        tensors: What became of each that adapters changed, file by file.
        taken: How many tensors and ranges an interrupted run had written.
        taken_bytes: Their size.
    """

    tensors: list[BakedTensor]
    taken: int
    taken_bytes: int


class Made(NamedTuple):
    """What one piece of work gives.

    Attributes:
        tensors: By key, as they are stored.
        result: What became of a tensor that adapters changed, or None.
    """

    tensors: tuple[tuple[str, torch.Tensor], ...]
    result: BakedTensor | None = None


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


def usable(options: Options, engine: Engine | None = None) -> Options:
    """The options with the device that is computed on.

    Args:
        options: As they were given.
        engine: Where tensors are computed; None for this machine's threads.

    Raises:
        OptionError: The device is not there, or the engine computes elsewhere.
    """
    from loratools.ops import _device

    return options._replace(device=_device.usable(_device.for_engine(options.device, engine)))


def torch_dtype(name: str) -> torch.dtype:
    """A dtype of torch by its safetensors name."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[name].torch)
    return found


def tasks(plan: ShardPlan) -> Iterator[Task]:
    """All work on one file; none where it is only copied."""
    for change in plan.changes:
        scale = change.scale.key if change.scale is not None and change.scale.key in plan.scales else ""
        yield Task(change=change, key=change.weight.key, scale=scale)
    own = {change.weight.key for change in plan.changes}
    for key, change in plan.scales.items():
        if change.weight.key not in own:
            yield Task(change=change, scale=key)  # its weight lies in another file
    for cast in plan.casts:
        yield Task(cast=cast)
    for added in plan.added:
        yield Task(change=added.change, key=added.key, added=added)


def work(options: Options, room: Room, task: tuple[Writer, Task]) -> BakedTensor | None:
    """A task's result, put into its file unless it is there; the memory that it lay in is used again."""
    writer, own = task
    said = _bake_records.read(writer.known(own.name), own.keys, key=own.told, summed=writer.summed)
    if said is not None and writer.holds(own.keys, said.sums):
        writer.keep(own.keys, said.crcs)
        return said.result
    found = made(options, own, room)
    data = [torch_bytes(tensor) for _, tensor in found.tensors]
    crcs = [writer.put(key, each) for (key, _), each in zip(found.tensors, data, strict=True)]
    if writer.recording:
        writer.note(own.name, _bake_records.record(data, crcs if writer.summed else (), found.result))
    return found.result


def made(options: Options, task: Task, room: Room | None = None) -> Made:
    """A task's result: a pure function, which may run in another process.

    Args:
        options: How to compute.
        task: What.
        room: Memory that the result may lie in, until the same thread asks for another.
    """
    if task.change is not None:
        return _baked(options, task, task.change, room)
    if task.cast is not None:
        return Made(((task.cast.weight.key, _cast(task.cast, room)),))
    if task.added is None:
        return Made(())
    from loratools.io.base import load

    copied = task.added.copied
    stored = _cast(Cast(copied, options.store), room) if options.store else load(copied, room)
    return Made(((task.key, stored),))


def _baked(options: Options, task: Task, change: Change, room: Room | None) -> Made:
    from loratools.io.base import load
    from loratools.ops._bake_tensor import bake_tensor

    data: BakedData = bake_tensor(job(change, options), room)
    tensors = [(task.key, data.data)] if task.key else []
    if task.scale and change.scale is not None:
        tensors.append((task.scale, load(change.scale) if data.scale is None else data.scale))
    return Made(tuple(tensors), data.result if task.key else None)


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


def _cast(cast: Cast, room: Room | None) -> torch.Tensor:
    """A tensor in another store dtype, (…) on the CPU.

    Raises:
        NonFiniteError: Its values do not fit.
    """
    from loratools.io.base import load
    from loratools.maths.float8 import dequantise

    stored = load(cast.weight, room)
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
