"""A bake as one plan: every file is laid out, and each task writes its own part of one.

Small tensors that lie in one file go together, since each task brings the file to the disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from loratools import kinds
from loratools.engine import Engine, Item, Plan
from loratools.errors import LoraError
from loratools.io.draft import Draft
from loratools.io.pieces import Piece
from loratools.ops import _bake_records, _bake_run
from loratools.ops._bake_run import Done, Meter, Options, Writer
from loratools.ops._bake_shards import ShardPlan, shape_after
from loratools.ops._bake_write import Part, Write, Written, bind, sample, write
from loratools.ops._changes import Change
from loratools.ops.checkpoint_results import BakedTensor

_TOGETHER = 64 << 20  # bytes that are written by one task, but for larger tensors
# Bytes: the rows that are worked on at a time, in float32 and in float64.
_BLOCKS, _PRECISE = 6 << 20, 36 << 20
_COPIED = 16 << 20  # bytes: what copying holds where it passes through memory
_WIDE = 24  # bytes of a number of a factor, as it is read, widened and computed with
# Bytes of a value of a tensor that has to be whole in the dtype that is computed in, with what comes of it.
_WHOLE, _WHOLE_PRECISE = 15, 27
_EACH = 12.0  # operations on a value beside the products: widened, added to, judged and rounded


class _File:
    """One file of the output while others write it."""

    def __init__(self, shard: ShardPlan, writer: Writer, *, cloned: bool) -> None:
        self.writer = writer
        self.cloned = cloned
        self.tasks = [] if shard.mode == "copy" else [*_bake_run.tasks(shard)]
        self.results: dict[str, BakedTensor | None] = {}
        self.crcs: dict[str, int] = {}
        self.left = 0

    def parts(self) -> Iterator[Part]:
        """All that is to be done."""
        writer, log = self.writer, self.writer.log
        for task in self.tasks:
            slots = tuple(writer.slots[key] for key in task.keys)
            yield Part(task, slots, known=writer.known(task.name))
        if self.cloned:
            return
        for piece in writer.pieces:
            there = log is not None and (log.cloned or piece.name in log.known)
            yield Part(piece, there=there)


def plan_of(
    shards: Sequence[ShardPlan], options: Options, place: Callable[[str], str]
) -> Plan[Write, tuple[Written, ...]]:
    """The plan of a bake, of which nothing is laid out yet: for predictions, and to be sampled.

    Args:
        shards: The files to write.
        options: How to compute.
        place: The path of each file by its name; there need not be one yet.
    """
    files = [
        _File(shard, _bake_run.writer_for(shard, place(shard.name), options.store), cloned=False)
        for shard in shards
    ]
    return _planned([task for file in files for task in _tasks(file, options)])


def run(shards: Sequence[ShardPlan], options: Options, draft: Draft, engine: Engine, meter: Meter) -> Done:
    """Write the files of a bake, each whole and on the disk.

    Args:
        shards: The files to write.
        options: How to compute.
        draft: Has a place and a log for each file.
        engine: Where the tasks run.
        meter: Told how many bytes are done.

    Raises:
        LoraError: A task failed, or a file is another than when it was planned.
        OSError: A file cannot be written.
    """
    options = _bake_run.usable(options, engine)
    files = [_laid_out(shard, options, draft) for shard in shards]
    owners = [(file, task) for file in files for task in _tasks(file, options)]
    for file in files:
        file.left = sum(owner is file for owner, _ in owners)
        if not file.left:
            file.writer.complete({})
    return _run(files, owners, engine, meter)


def _run(files: Sequence[_File], owners: Sequence[tuple[_File, Write]], engine: Engine, meter: Meter) -> Done:
    total = sum(file.writer.total for file in files)
    plan = _planned([task for _, task in owners])
    done = total - sum(item.written for item in plan.items)
    taken: list[int] = []
    for number, written in engine.run(plan):
        file, task = owners[number]
        for part, each in zip(task.parts, written, strict=True):
            _note(file, part, each)
            if each.taken and (part.known is not None or part.there):
                taken.append(_size(part))
        file.left -= 1
        if not file.left:
            file.writer.complete(file.crcs)
        done += plan.items[number].written
        meter.show(written[-1].name.partition(" ")[2], done)
    results = [file.results.get(task.name) for file in files for task in file.tasks]
    return Done([each for each in results if each is not None], len(taken), sum(taken))


def _laid_out(shard: ShardPlan, options: Options, draft: Draft) -> _File:
    writer = _bake_run.writer_for(shard, draft.place(shard.name), options.store)
    writer.journalled(draft.log(shard.name))
    return _File(shard, writer, cloned=writer.lay_out())


def _tasks(file: _File, options: Options) -> Iterator[Write]:
    """The parts of a file, put together to tasks."""
    writer = file.writer
    for parts in _together(file.parts()):
        yield Write(writer.path, writer.total, options, tuple(parts), writer.summed)


def _together(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Neighbours of one sort, until they are worth a task."""
    group: list[Part] = []
    size = 0
    for part in parts:
        other = bool(group) and isinstance(part.work, Piece) != isinstance(group[0].work, Piece)
        if group and (other or size + _size(part) > _TOGETHER):
            yield group
            group, size = [], 0
        group.append(part)
        size += _size(part)
    if group:
        yield group


def _note(file: _File, part: Part, written: Written) -> None:
    """Have a part that is on the disk recorded, and keep what the file and the report need of it."""
    log = file.writer.log
    if log is not None and log.recording:
        log.record([(written.name, written.record)])
    if isinstance(part.work, Piece):
        return
    said = _bake_records.read(written.record, part.work.keys, key=part.work.told, summed=file.writer.summed)
    if said is None:
        raise LoraError(
            f"tensor {part.work.keys[0]}: a worker said something else than what it was asked for"
        )
    file.results[part.work.name] = said.result
    file.crcs.update(zip(part.work.keys, said.crcs, strict=False))


def _size(part: Part) -> int:
    """Bytes that a part writes."""
    if isinstance(part.work, Piece):
        return part.work.size
    return sum(slot.stop - slot.start for slot in part.slots)


def _planned(tasks: Sequence[Write]) -> Plan[Write, tuple[Written, ...]]:
    return Plan(write, tasks, [item(task) for task in tasks], bind=bind, sample=sample)


def item(task: Write) -> Item:
    """What a task costs."""
    each = [_part_item(task, part) for part in task.parts]
    first = task.parts[0].work
    return Item(
        f"{task.path}: {first.name}",
        read=sum(part.read for part in each),
        written=sum(part.written for part in each),
        memory=max(part.memory for part in each),
        cost=sum(part.cost for part in each),
        kind=each[0].kind,
    )


def _part_item(task: Write, part: Part) -> Item:
    size = _size(part)
    if isinstance(part.work, Piece):
        return Item("", read=size, written=size, memory=_COPIED, kind="copy")
    change = part.work.change
    if change is None:
        weight = part.work.source
        return Item("", weight.nbytes, size, _COPIED + weight.nbytes + size, math.prod(weight.shape), "cast")
    stored = change.weight.nbytes + (change.scale.nbytes if change.scale is not None else 0)
    factors = _factors(change)
    replacing = [term.tensor for term in change.terms if term.tensor is not None]
    numbers = math.prod(shape_after(change))
    precise = task.options.precise
    held = (_PRECISE if precise else _BLOCKS) + stored
    held += sum(_WIDE * count for count, _ in factors) + sum(each.nbytes for each in replacing)
    if task.options.rounding == "compensated" or change.scale is not None:
        held += size + (_WHOLE_PRECISE if precise else _WHOLE) * numbers
    elif not _in_place(change, task.options):
        held += size
    return Item(
        "",
        read=stored + sum(each for _, each in factors) + sum(each.nbytes for each in replacing),
        written=size,
        memory=held,
        cost=numbers * (_EACH + _ranks(change)),
        kind="bake",
    )


def _in_place(change: Change, options: Options) -> bool:
    """Whether the result takes the place of the tensor in memory."""
    alike = options.store in (None, change.weight.dtype)
    modules = [term.module for term in change.terms if term.module is not None]
    return alike and not any(kinds.get(module.kind).needs_base for module in modules)


def _factors(change: Change) -> list[tuple[int, int]]:
    """Of each tensor of the modules that adapters bring along, how many numbers and bytes it has."""
    refs = [ref for term in change.terms if term.module is not None for _, ref in term.module.tensors()]
    return [(math.prod(ref.shape), ref.nbytes) for ref in refs]


def _ranks(change: Change) -> float:
    """Operations on a value that low-rank products take."""
    return sum(2.0 * (term.module.rank or 1) for term in change.terms if term.module is not None)
