"""All scenarios, and how often each promise held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from tests.faults import folders, full_disks, kills, ray_workers, reading
from tests.faults.full_disks import CannotError
from tests.faults.stage import OPERATIONS, Operation, Stage

Runs = Callable[[Stage, Operation, int, Random], Iterator[list[str]]]


class Scenario(NamedTuple):
    """One kind of fault.

    Attributes:
        name: As --only has it.
        runs: Gives for each run the promises that it broke.
        share: How many runs of each operation, as a fraction of the kills that are asked for.
    """

    name: str
    runs: Runs
    share: float

    @property
    def summary(self) -> str:
        """What happens, in a sentence."""
        return (self.runs.__doc__ or "").strip()


SCENARIOS = (
    Scenario("kill-moments", kills.at_moments, 1.0),
    Scenario("kill-calls", kills.at_calls, 0.5),
    Scenario("kill-processes", kills.whole_processes, 0.05),
    Scenario("disk-full", full_disks.small_file_system, 0.1),
    Scenario("file-limit", full_disks.limited_files, 0.1),
    Scenario("read-errors", reading.errors, 0.15),
    Scenario("short-reads", reading.short_reads, 0.05),
    Scenario("changed-at-end", reading.changed_at_the_end, 0.02),
    Scenario("changed-meanwhile", reading.changed_meanwhile, 0.2),
    Scenario("read-only", folders.read_only, 0.01),
    Scenario("vanishing", folders.vanishing, 0.1),
    Scenario("missing", folders.missing, 0.005),
    Scenario("two-at-once", folders.two_at_once, 0.05),
    Scenario("ray-worker", ray_workers.lost_worker, 0.01),
)


class Row(NamedTuple):
    """What came of one scenario with one operation.

    Attributes:
        scenario: Its name.
        operation: Its name.
        runs: A count.
        failed: Those in which a promise was broken, a count.
        broken: Those promises.
        skipped: Why there are no runs; empty where there are.
    """

    scenario: str
    operation: str
    runs: int
    failed: int
    broken: tuple[str, ...]
    skipped: str = ""


def rows(
    stage: Stage,
    scenarios: Sequence[Scenario],
    operations: Sequence[Operation],
    *,
    kills: int,
    seed: int,
    least: int = 1,
) -> Iterator[Row]:
    """Run scenarios, each with every operation.

    Args:
        stage: Where.
        scenarios: Which.
        operations: Which.
        kills: How often each operation is killed at a moment, a count; all others are in proportion.
        seed: Of what is random; each scenario and operation has its own draws.
        least: Runs of each, a count.
    """
    for scenario in scenarios:
        for operation in operations:
            stage.prepare(operation)
            draw = Random(f"{seed} {scenario.name} {operation.name}")
            count = max(least, round(scenario.share * kills))
            yield _row(stage, scenario, operation, count, draw)


def named(names: Sequence[str]) -> list[Scenario]:
    """Scenarios by name; all where none is given.

    Raises:
        ValueError: There is none of a name.
    """
    known = {each.name: each for each in SCENARIOS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"there is no scenario {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in names] or list(SCENARIOS)


def operations_of(names: Sequence[str]) -> list[Operation]:
    """Operations by the command's name, "bake" being two; all where none is given.

    Raises:
        ValueError: There is none of a name.
    """
    known = {each.arguments[0] for each in OPERATIONS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"there is no operation {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return [each for each in OPERATIONS if not names or each.arguments[0] in names]


def _row(stage: Stage, scenario: Scenario, operation: Operation, count: int, draw: Random) -> Row:
    try:
        found = list(scenario.runs(stage, operation, count, draw))
    except CannotError as error:
        return Row(scenario.name, operation.name, 0, 0, (), str(error))
    broken = [promise for run in found for promise in run]
    return Row(scenario.name, operation.name, len(found), sum(bool(run) for run in found), tuple(broken))
