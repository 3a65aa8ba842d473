"""One adapter of a library in the form that a pack keeps: a task that rests on nothing but its own files.

What rests on the others (whether they are of one base, which of them are the same, and in which order they come)
``_pack_run`` decides, when all before it are known.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loratools import formats
from loratools.engine import Item
from loratools.errors import LoraError, NonFiniteError, WriteError
from loratools.io import storage
from loratools.ops import _pack_index, _pack_normal, _pack_twins
from loratools.ops._pack_files import Prepared
from loratools.ops._pack_fit import Fit, program
from loratools.ops._pack_inputs import Source
from loratools.ops._pack_normal import Normal
from loratools.ops._pack_plan import Request
from loratools.ops._pack_planner import Planned, Planner
from loratools.ops.pack_results import Packed

_BASE = "base_model_name_or_path"
_WIDENED = 256 << 20  # bytes: factors of one make-up, a part at a time, in float64
_OPERATIONS = 20.0  # for each byte: folding, sketching, hashing


class Making(NamedTuple):
    """What is the same for all adapters.

    Attributes:
        request: What the pack is to be like.
        runtime: The program that is to serve it, or None.
        max_rank: Its limit of the rank, a count; 0: its usual one.
        folder: Where adapters are written; empty where they are not.
        named: Whether they have a place in the pack: not with a shared basis.
    """

    request: Request
    runtime: str | None
    max_rank: int
    folder: str
    named: bool


class Made(NamedTuple):
    """What became of one adapter by itself.

    Attributes:
        key: A hash of the names and shapes of its modules; empty where it cannot be read.
        shapes: Of its modules' weights.
        entry: What the index will say of it; None where it cannot be in a pack.
        arch: Its architecture.
        marks: (64,) float64, what tells it from others; None without an entry.
        causes: Why the program would not run it.
        problem: Why its values cannot be had, or empty.
        warnings: What else is to be said of it.
    """

    key: str
    shapes: Mapping[str, Sequence[int]]
    entry: dict[str, Any] | None = None
    arch: str = ""
    marks: torch.Tensor | None = None
    causes: tuple[str, ...] = ()
    problem: str = ""
    warnings: tuple[str, ...] = ()


class _Tools(threading.local):
    """What a thread has made for the adapters of one pack: plans know places in memory, which are filled in turn."""

    def __init__(self) -> None:
        self._made: tuple[Making, Planner, Fit] | None = None

    def of(self, making: Making) -> tuple[Planner, Fit]:
        """What reads adapters, and what they are checked by."""
        if self._made is None or self._made[0] != making:
            request = making.request
            fit = Fit(request.layout, program(making.runtime), request.base, making.max_rank)
            self._made = making, Planner(request), fit
        return self._made[1:]

    def drop(self) -> None:
        """Let go of them, and of the files that they hold."""
        self._made = None


_tools = _Tools()


def make(making: Making, source: Source) -> Made:
    """Read, check and write one adapter; the same whatever was made before.

    Raises:
        WriteError: The system takes no more: that is not the adapter's fault.
    """
    planner, fit = _tools.of(making)
    try:
        planned = planner.planned(source.path)
        causes, warnings = fit.verdict(planned.plan)
        found = Made(
            planned.plan.key,
            planned.plan.shapes,
            arch=planned.plan.adapter.arch,
            causes=tuple(causes),
            warnings=tuple(warnings),
        )
        try:
            normal = _pack_normal.normal(planned)
        except NonFiniteError as error:
            return found._replace(problem=str(error))
        if causes:
            return found
        marks = _pack_twins.marks(normal.sketch)
        entry = _pack_index.said(_written(making, source, planned, normal))
        return found._replace(entry=entry, marks=marks)
    except WriteError:
        raise
    except (LoraError, OSError) as error:
        return Made("", {}, problem=str(error))


def forget() -> None:
    """Let go of what this thread keeps for the next adapter of the same pack."""
    _tools.drop()


def item(source: Source) -> Item:
    """What one adapter costs an executor."""
    try:
        size = storage.size(source.path)
    except (LoraError, OSError):  # whoever reads it says why
        size = 0
    return Item(
        source.name,
        read=size,
        written=size,
        memory=2 * size + _WIDENED,
        cost=_OPERATIONS * size,
        kind="pack",
    )


def place(layout: str, name: str) -> str:
    """Where an adapter lies in a pack: a file, or a folder where the layout wants one."""
    form = formats.get(layout)
    suffix = "" if form.folder else f".{form.container}"
    return f"{_pack_index.ADAPTERS}/{name}{suffix}"


def weights(layout: str, path: str) -> str:
    """The file of weights of an adapter that lies there."""
    form = formats.get(layout)
    return f"{path}/{form.weights}" if form.folder else path


def _written(making: Making, source: Source, planned: Planned, normal: Normal) -> Packed:
    """Write an adapter, where it is to be written, and say what it is."""
    plan, path, size, digest = planned.plan, "", 0, ""
    if making.named:
        path = place(making.request.layout, source.name)
        ready = _pack_normal.filled(normal, making.request.layout)
        size, digest = ready.size, _put(ready, making.folder, path)
    base = plan.adapter.config.get(_BASE)
    return Packed(
        name=source.name,
        path=path,
        source=source.path,
        source_sha256=planned.sha256(),
        hash=normal.hash,
        layout=plan.source,
        rank=plan.rank,
        bucket=plan.bucket,
        ranks=plan.ranks,
        modules=len(plan.adapter.modules),
        scales=plan.scales,
        rounded=plan.rounded,
        dtype=plan.dtype,
        base=base if isinstance(base, str) else "",
        bytes=size,
        sha256=digest,
    )


def _put(ready: Prepared, folder: str, path: str) -> str:
    """The sha256 of the weights, once they are written; empty where nothing is.

    Raises:
        WriteError: The system refuses.
    """
    if not folder:
        return ""
    try:
        return ready.write(Path(folder, path))
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(
            f"cannot be written: {error.strerror or error}",
            path=Path(folder, path),
            todo="Make room, check the permissions, or choose another folder",
        ) from error
