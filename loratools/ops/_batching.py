"""Modules on an accelerator: those of one make-up go there together, are computed together and come back together.

A batch is one task of one thread: it reads, gathers tensors in pinned memory, sends them in one transfer, computes and
brings the results home in another, all on a stream of the thread's own. While one batch is computed, others are read
and copied. What is on the device at a time is bounded by bytes, whatever the adapters hold. Where its memory is too
small all the same, perhaps because others use it, a batch is divided, and a single module left to the CPU.
Without an accelerator the same code runs on the CPU.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from loratools.engine import Engine, Item, Plan, local
from loratools.engine.local import Local
from loratools.kinds import lora
from loratools.model import Module

Task = TypeVar("Task")
Result = TypeVar("Result")
Given = TypeVar("Given", contravariant=True)
Made = TypeVar("Made", covariant=True)

# Bytes of float64 factors: of one batch, unless it is a single module; and of all that are under way. Decomposing them
# takes about six times as much.
_BATCH = 32 << 20
_UNDER_WAY = 512 << 20
_FLOAT64 = 8


def batch_bytes(device: str) -> int:
    """How many bytes of float64 factors a batch has on a device; 0 where modules are computed one by one."""
    return _BATCH if device.startswith("cuda") else 0


def alike(module: Module) -> Hashable:
    """What modules have in common that can share a batch; None of one that cannot."""
    if not lora.is_product(module):
        return None
    roles = ("up", "down", "mid")
    return tuple(
        (role, ref.shape, ref.dtype) for role, ref in sorted(module.factors.items()) if role in roles
    )


def module_bytes(module: Module) -> int:
    """Bytes of what is decomposed, in float64: the factors, or ΔW itself of a kind that is not their product."""
    shape = module.shape or ()
    numbers = math.prod(shape)
    if lora.is_product(module) and module.rank:
        numbers = module.rank * (shape[0] + math.prod(shape[1:])) if shape else 0
    return _FLOAT64 * numbers


def gathered(
    tasks: Iterable[Task], key: Callable[[Task], Hashable], size: Callable[[Task], int], most: int
) -> list[list[Task]]:
    """Tasks in batches.

    Args:
        tasks: In any order, which a batch keeps.
        key: What the tasks of a batch have in common; None of one that shares none.
        size: Bytes of float64 factors.
        most: Of these bytes in a batch of more than one task.
    """
    batches: list[list[Task]] = []
    growing: dict[Hashable, tuple[list[Task], int]] = {}
    for task in tasks:
        common, own = key(task), size(task)
        batch, held = growing.get(common, ([], 0))
        if common is None or not batch or held + own > most:
            batch, held = [], 0
            batches.append(batch)
        batch.append(task)
        growing[common] = batch, held + own
    return batches


def run(
    work: Callable[[list[Task]], Sequence[Result]],
    alone: Callable[[Task], Result],
    batches: Iterable[list[Task]],
    device: str,
    *,
    size: Callable[[Task], int],
    threads: int | None = None,
) -> Iterator[tuple[Task, Result]]:
    """``work`` of every batch.

    Args:
        work: The results of a batch, in its order; on the stream that is current.
        alone: The result of one task by the CPU, which has the memory that the device lacks.
        batches: Taken from the caller's thread.
        device: Where ``work`` computes.
        size: Bytes of float64 factors.
        threads: How many batches are worked on side by side, a count; None for one per processor.

    Yields:
        Each task with its result, batch by batch.
    """
    streams = _Streams(device)

    def done(batch: list[Task]) -> list[tuple[Task, Result]]:
        try:
            with streams.one():
                return list(zip(batch, work(batch), strict=True))
        except torch.cuda.OutOfMemoryError:
            pass  # what was computed is let go of before the next try
        if len(batch) == 1:
            return [(batch[0], alone(batch[0]))]
        half = len(batch) // 2
        return [*done(batch[:half]), *done(batch[half:])]

    held = partial(_held, size)
    for results in local.run(done, batches, threads=threads, size=held, most=_UNDER_WAY):
        yield from results


class Work(Protocol[Given, Made]):
    """What is done with tasks, of which several can share a batch on a device."""

    def __call__(self, task: Given, /) -> Made:
        """The result of one task, where it says."""

    def together(self, tasks: Sequence[Given], device: str, /) -> Sequence[Made]:
        """The results of tasks that share a batch, on a device."""

    def alone(self, task: Given, /) -> Made:
        """The result of one task by the CPU."""

    def alike(self, task: Given, /) -> Hashable:
        """What tasks have in common that can share a batch; None of one that cannot."""

    def size(self, task: Given, /) -> int:
        """Bytes of float64 factors."""


class OnDevices(NamedTuple):
    """An engine of this machine's accelerators, for plans whose ``work`` is a ``Work``: tasks go there in batches.

    Attributes:
        devices: Those that share the work.
        batch: Bytes of float64 factors that are worked on together.
        threads: How many batches are worked on side by side on a single device, a count; None for one per processor.
            Several have one batch each.
    """

    devices: tuple[str, ...]
    batch: int
    threads: int | None = None

    @classmethod
    def of(cls, engine: Engine | None, device: str, batch: int, threads: int | None) -> OnDevices | None:
        """The engine for the devices of another one, or for a device that works in batches; None for neither."""
        devices = () if engine is None else engine.devices
        if devices:
            return cls(devices, batch_bytes(devices[0]), threads)
        return (
            cls((device,), batch, threads) if batch and not (engine is not None and engine.remote) else None
        )

    @property
    def remote(self) -> bool:
        """Tasks run in this process."""
        return False

    @property
    def device_kind(self) -> str:
        """That of its devices."""
        return self.devices[0].partition(":")[0]

    def run(self, plan: Plan[Task, Result]) -> Iterator[tuple[int, Result]]:
        """The number of each task with its result, in any order."""
        work: Any = plan.work
        numbered = list(enumerate(plan.tasks))
        batches = gathered(
            numbered, lambda each: work.alike(each[1]), lambda each: work.size(each[1]), self.batch
        )
        if len(self.devices) == 1:
            for (number, _), result in self._streamed(work, batches):
                yield number, result
            return
        items = [
            Item(str(number), memory=sum(work.size(task) for _, task in batch))
            for number, batch in enumerate(batches)
        ]
        shares = [_Share(work, batch) for batch in batches]
        for _, results in Local(devices=self.devices).run(Plan(_shared, shares, items, bind=_share_bound)):
            yield from results

    def _streamed(self, work: Any, batches: Sequence[list[tuple[int, Any]]]) -> Iterator[tuple[Any, Any]]:
        """On one device, several batches side by side."""
        (device,) = self.devices
        return run(
            lambda batch: work.together([task for _, task in batch], device),
            lambda each: work.alone(each[1]),
            batches,
            device,
            size=lambda each: work.size(each[1]),
            threads=self.threads,
        )


class _Share(NamedTuple):
    """A batch for the device that takes it."""

    work: Any
    batch: list[tuple[int, Any]]
    device: str = "cpu"


def _share_bound(share: _Share, device: str) -> _Share:
    return share._replace(device=device)


def _shared(share: _Share) -> list[tuple[int, Any]]:
    """The results of a batch by the number of their tasks, on its own device."""
    found = OnDevices((share.device,), 0)._streamed(share.work, [share.batch])
    return [(number, result) for (number, _), result in found]


def _held(size: Callable[[Task], int], batch: list[Task]) -> int:
    return sum(map(size, batch))


class _Streams:
    """Streams of a device, each of one thread at a time; as few as are needed, since memory is kept for each."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._idle: deque[torch.cuda.Stream] = deque()
        if device.startswith("cuda"):
            # torch loads its linear algebra for CUDA at the first use, which two threads must not do at once.
            torch.linalg.inv(torch.ones(1, 1, device=device))

    @contextmanager
    def one(self) -> Iterator[None]:
        """Make one current; nothing where the device has none."""
        if not self._device.startswith("cuda"):
            yield
            return
        try:
            stream = self._idle.pop()
        except IndexError:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self._idle.append(stream)


def sent(tensors: Sequence[torch.Tensor], device: str) -> torch.Tensor:
    """CPU tensors of one shape and dtype as one on a device, (n, …), in one transfer that need not be waited for."""
    if not device.startswith("cuda"):
        return torch.stack(list(tensors)).to(device)
    host = _pinned((len(tensors), *tensors[0].shape), tensors[0].dtype)
    for place, tensor in zip(host, tensors, strict=True):
        place.copy_(tensor)
    return host.to(device, non_blocking=True)


def fetched(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of one dtype on one device, in the CPU's memory after one transfer; themselves if they are there."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    there = torch.cat([tensor.reshape(-1) for tensor in tensors])
    host = _pinned(there.shape, there.dtype).copy_(there, non_blocking=True)
    torch.cuda.current_stream(there.device).synchronize()
    parts = torch.split(host, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory of the host that a device reads and writes by itself."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return torch.empty(shape, dtype=dtype)  # the system pins no more: the copy waits instead
