"""Whether a checkpoint is a base with adapters baked in, tensor by tensor; memory is bounded by the largest of them.

What adapters change is compared with W + Σ wᵢ · ΔWᵢ in float64 (in float32 where that makes certain that it is W + ΔW
rounded to nearest: ``_verify_nearest``), by the rule that ``_verify_tensor`` states: "baked" is
what rounding to the store dtype makes of it (to nearest, stochastic or compensated, after a computation in float32 or
better); "not baked" is the base's; "partly" is ΔW times another strength, or a result that is nearer to W + ΔW than W;
all else is "wrong". What no adapter touches has to be the base's bit for bit, or after a cast where the result has
another dtype: else it is "unexpected". A change that the store dtype has no room for cannot be told from no change: it
counts as baked, unless nothing at all of any change is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence

from loratools.engine import Engine, Plan
from loratools.engine.local import Local
from loratools.io import unchanged
from loratools.io.base import keys_of
from loratools.model import Adapter
from loratools.ops import _locate, files
from loratools.ops._outputs import PathLike
from loratools.ops._strengths import strengths
from loratools.ops._unmapped import unmapped
from loratools.ops._verify_tasks import BAKED, LOST, NOT_BAKED, Job, Task, item, strangers, tasks
from loratools.ops._verify_tensor import verify_tensor
from loratools.ops._verify_untouched import untouched
from loratools.ops.checkpoint_results import VerifiedTensor, VerifyReport

Progress = Callable[[str, int, int], None]


@unchanged.watched
def verify(
    base: PathLike,
    adapters: Sequence[PathLike | Adapter],
    baked: PathLike,
    *,
    weights: Sequence[float] | None = None,
    components: Collection[str] | None = None,
    skip_missing: bool = False,
    arch: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> VerifyReport:
    """Compare a checkpoint with what baking adapters into a base makes.

    Args:
        base: The checkpoint that was baked into.
        adapters: Paths, or from ``load``.
        baked: What should be the result: it may be sharded otherwise, in another container or dtype.
        weights: What each ΔW was multiplied by; default 1 each.
        components: Those that were baked ("denoiser", "text_encoder", …); default: all.
        skip_missing: Whether modules that the base has no weight for were left out.
        arch: The architecture, overriding detection.
        threads: How many tensors are worked on side by side, a count; default: one per processor.
        progress: Called with a tensor's name, the bytes done and the bytes of all.
        engine: Where to compare; default: this machine's threads.

    Returns:
        A verdict on every tensor that should have changed or did; ``ok`` is whether all are as they should be.

    Raises:
        LoraError: A file cannot be read, or the adapters do not fit the base.
    """
    loaded = [
        each if isinstance(each, Adapter) else unmapped(files.bakeable(each, arch=arch)) for each in adapters
    ]
    multiplied = strengths(weights, len(loaded))
    before, after = keys_of(base), keys_of(baked)
    plan = _locate.plan(
        before, loaded, multiplied, arch=arch, components=components, skip_missing=skip_missing
    )
    results = _run(list(tasks(before, after, plan)), engine or Local(threads), progress)
    told = [each for each in results if each is not None]
    found = _settled([*told, *strangers(before, after, plan)])
    return VerifyReport(
        base=before.path,
        baked=after.path,
        adapters=tuple(adapter.path for adapter in loaded),
        weights=multiplied,
        arch=plan.arch,
        ok=all(tensor.verdict == BAKED for tensor in found),
        tensors=found,
        untouched=sum(each is None for each in results),
        kept=_kept(found),
        error=_error(found),
        missing=plan.missing,
        notes=(*plan.notes, *_notes(found)),
    )


def _run(work: Sequence[Task], engine: Engine, progress: Progress | None) -> list[VerifiedTensor | None]:
    """Each task's result: None for a tensor that is as it was and should be."""
    plan = Plan(_verified, work, [item(task) for task in work])
    sizes = [(task.change.weight if isinstance(task, Job) else task.weight).nbytes for task in work]
    total, done = sum(sizes), 0
    results: dict[int, VerifiedTensor | None] = {}
    for number, result in engine.run(plan):
        done += sizes[number]
        results[number] = result
        if progress is not None:
            progress(work[number].key, done, total)
    return [results[number] for number in range(len(work))]


def _verified(task: Task) -> VerifiedTensor | None:
    return verify_tensor(task) if isinstance(task, Job) else untouched(task)


def _settled(found: Sequence[VerifiedTensor]) -> tuple[VerifiedTensor, ...]:
    """The verdicts once all are known: where nothing changed anywhere, nothing was baked."""
    told = [tensor for tensor in found if tensor.norm]
    if not told or not all(tensor.note == LOST or tensor.verdict == NOT_BAKED for tensor in told):
        return tuple(found)
    return tuple(
        tensor._replace(verdict=NOT_BAKED, note="") if tensor.note == LOST else tensor for tensor in found
    )


def _kept(found: Sequence[VerifiedTensor]) -> float | None:
    """How much of ΔW is in the result, over all tensors."""
    told = [(tensor.kept, tensor.norm) for tensor in found if tensor.kept is not None]
    whole = sum(norm**2 for _, norm in told)
    return sum(kept * norm**2 for kept, norm in told) / whole if whole else None


def _error(found: Sequence[VerifiedTensor]) -> float | None:
    """How far the result is from W + ΔW, relative to ‖ΔW‖ over all tensors."""
    told = [(tensor.error, tensor.norm) for tensor in found if tensor.error is not None]
    whole = math.hypot(*(norm for _, norm in told))
    return math.hypot(*(error * norm for error, norm in told)) / whole if whole else None


def _notes(found: Sequence[VerifiedTensor]) -> Iterator[str]:
    along = [tensor.strength for tensor in found if tensor.strength is not None]
    if along:
        low, high = min(along), max(along)
        told = f"{low:.3g}" if high - low < 0.01 * abs(high) else f"{low:.3g} to {high:.3g}"
        yield f"{len(along)} tensors are along the change, at {told} times the strength"
    lost = [tensor for tensor in found if tensor.note == LOST]
    if lost:
        yield f"{len(lost)} tensors are the base's: {LOST}. Bake with --rounding stochastic or compensated to keep it"
    for note, tensors in _by_note(found).items():
        yield f"{tensors[0]}: {note}" + (f" (and {len(tensors) - 1} more like it)" if tensors[1:] else "")


def _by_note(found: Sequence[VerifiedTensor]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for tensor in found:
        if tensor.note and tensor.note != LOST:
            groups.setdefault(tensor.note, []).append(tensor.key)
    return groups
