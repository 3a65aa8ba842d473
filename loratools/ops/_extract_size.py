"""Ranks within the size of a file: spent where they keep most, over all modules together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from loratools.errors import OptionError
from loratools.maths.rank import allocate
from loratools.ops._extract_modules import Extracted
from loratools.ops._extract_tensor import Job

# How much more than an even share of the budget a module's spectrum is computed for at first.
_AHEAD = 4
_FIRST = 16

Measure = Callable[[Mapping[int, int]], int]
Deepen = Callable[[Sequence[Job]], Mapping[int, Extracted]]


def first_ranks(jobs: Sequence[Job], budget: int, itemsize: int) -> list[Job]:
    """The jobs with as many ranks to compute as are likely to be needed at most."""
    costs = sum(sum(job.matrix) * itemsize for job in jobs)
    ahead = max(_FIRST, _AHEAD * budget // max(1, costs))
    return [_limited(job, min(ahead, _most(job))) for job in jobs]


def spend(
    kept: dict[int, Extracted],
    jobs: Mapping[int, Job],
    budget: int,
    least: int,
    *,
    measure: Measure,
    deepen: Deepen,
) -> dict[int, int]:
    """The rank of each module, so that the file is no larger than the budget.

    Where a module could use more ranks than were computed, it is decomposed again for more of them: no module is
    held back by how far it was looked at first.

    Args:
        kept: The results by job number; those that are decomposed again are replaced in it.
        jobs: By number, with the rank that was asked for.
        budget: Bytes of the whole file.
        least: The smallest rank, a count.
        measure: The file's size for given ranks, header included.
        deepen: Runs jobs again.

    Returns:
        Ranks by job number.

    Raises:
        OptionError: Not even the smallest ranks fit.
    """
    asked = dict(jobs)
    room = budget
    while True:
        ranks = _allotted(kept, room, least, budget, measure)
        short = [
            asked[number]
            for number, rank in ranks.items()
            if rank == kept[number].rank == _asked(asked[number]) < _most(jobs[number])
        ]
        if short:
            more = [_limited(job, min(_AHEAD * _asked(job), _most(jobs[job.number]))) for job in short]
            asked.update({job.number: job for job in more})
            kept.update(deepen(more))
            continue
        over = measure(ranks) - budget
        if over <= 0:
            return ranks
        room -= over


def _allotted(
    kept: Mapping[int, Extracted], room: int, least: int, budget: int, measure: Measure
) -> dict[int, int]:
    spectra = [np.asarray(each.found.sigma) for each in kept.values()]
    try:
        ranks = allocate(spectra, [each.cost for each in kept.values()], room, least)
    except OptionError as error:
        smallest = {number: min(least, each.rank) for number, each in kept.items()}
        raise OptionError(
            f"a file of {budget:,} bytes does not hold rank {least} of all {len(kept)} modules",
            expected=f"At least {measure(smallest):,} bytes were expected",
            todo="Ask for a larger size, or leave modules out with --exclude",
        ) from error
    return dict(zip(kept, ranks, strict=True))


def _asked(job: Job) -> int:
    return min(int(job.rule.value), *job.matrix) if job.rule is not None else 0


def _most(job: Job) -> int:
    """The largest rank that a job may have: a limit, or the matrix's own."""
    most = job.rule.most if job.rule is not None else None
    full = min(job.matrix)
    return full if most is None else min(most, full)


def _limited(job: Job, rank: int) -> Job:
    rule = job.rule
    return job if rule is None else job._replace(rule=rule._replace(value=max(rank, rule.least)))
