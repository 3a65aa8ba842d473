"""All targets of a merge computed: side by side on the CPU, in batches on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from loratools.engine import local
from loratools.model import Target
from loratools.ops import _combine, _combine_batch
from loratools.ops._batching import batch_bytes
from loratools.ops._combine import Combined
from loratools.ops._request import Request
from loratools.ops.align import Contribution

Progress = Callable[[str, int, int], None]


def run(
    asked: Request,
    targets: Mapping[Target, Sequence[Contribution]],
    threads: int | None,
    progress: Progress | None,
) -> dict[Target, Combined]:
    """Every target's result, in the order of the targets.

    Args:
        asked: What was asked for.
        targets: What the inputs bring to each.
        threads: How many are worked on side by side, a count; default: one per processor.
        progress: Called with the target's name, its number and the count of all.
    """
    results: dict[Target, Combined] = {}
    for number, (target, result) in enumerate(_results(asked, targets, threads), start=1):
        results[target] = result
        if progress is not None:
            progress(str(target), number, len(targets))
    return {target: results[target] for target in targets}


def _results(
    asked: Request, targets: Mapping[Target, Sequence[Contribution]], threads: int | None
) -> Iterator[tuple[Target, Combined]]:
    """Every target with its result: side by side on the CPU, in batches on an accelerator."""
    batch = batch_bytes(asked.device)
    if batch:
        yield from _combine_batch.run(asked, targets, batch=batch, threads=threads)
        return

    def work(target: Target) -> Combined:
        return _combine.combine(asked, target, targets[target])

    yield from zip(targets, local.run(work, targets, threads=threads), strict=True)
