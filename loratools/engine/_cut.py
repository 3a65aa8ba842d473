"""Tasks in batches, for engines to which sending one costs more than a small task: by bytes and cost, largest first."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.engine import Item

# What a batch has at most, unless it is a single task: about a second of work, beside which sending it costs nothing.
_BYTES = 256 << 20  # read and written
_COST = 2e10  # floating-point operations
_EACH = 4  # batches for each worker at least, so that the last ones end at about the same time


def cut(items: Sequence[Item], workers: int = 1) -> list[tuple[int, ...]]:
    """Batches of tasks, in the order in which they are to be begun: the largest first.

    Whoever is free takes the next, so that no worker is busy for longer than the mean and one batch (longest processing
    time first; R. L. Graham, "Bounds on Multiprocessing Timing Anomalies", 1969). Small tasks that follow each other in
    the plan lie beside each other in files, and go together.

    Args:
        items: What each task costs.
        workers: How many tasks run at a time, a count.

    Returns:
        Numbers of tasks; each is in one batch.
    """
    sizes = [_size(item) for item in items]
    most = min(1.0, sum(sizes) / (_EACH * workers))
    batches: list[list[int]] = []
    growing: list[int] = []
    filled = 0.0
    for number, size in enumerate(sizes):
        if size > most / 2:
            batches.append([number])
            continue
        if not growing or filled + size > most:
            growing, filled = [], 0.0
            batches.append(growing)
        growing.append(number)
        filled += size
    batches.sort(key=lambda batch: -sum(sizes[number] for number in batch))
    return [tuple(batch) for batch in batches]


def _size(item: Item) -> float:
    """A task as a share of the largest batch."""
    return (item.read + item.written) / _BYTES + item.cost / _COST
