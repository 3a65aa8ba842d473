"""The short form of the campaign: a few kills of each operation, and every other fault once."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import pytest

from tests.faults import campaign, inputs
from tests.faults.stage import OPERATIONS, Stage

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="this platform forks no processes"
)

SEED = 1
KILLS = 2  # of each operation at a moment, and as many at a call of the system
# One operation that writes a file and one that writes a folder, one that reads by offsets and one that maps.
ONCE = [
    ("kill-processes", "bake"),
    ("disk-full", "bake"),
    ("disk-full", "merge"),
    ("file-limit", "bake sharded"),
    ("file-limit", "extract"),
    ("read-errors", "bake sharded"),
    ("read-errors", "resize"),
    ("short-reads", "extract"),
    ("short-reads", "merge"),
    ("changed-at-end", "extract"),
    ("changed-at-end", "resize"),
    ("changed-meanwhile", "bake"),
    ("read-only", "bake"),
    ("read-only", "merge"),
    ("vanishing", "bake sharded"),
    ("missing", "extract"),
    ("two-at-once", "bake sharded"),
    ("two-at-once", "resize"),
]
MANY = [(scenario, operation.name) for scenario in ("kill-moments", "kill-calls") for operation in OPERATIONS]


@pytest.fixture(scope="module")
def stage():
    # Not in pytest's own folder, which other users may not enter.
    with Stage(Path(tempfile.mkdtemp(prefix="loratools-faults-")), inputs.SMALL, measured=1) as made:
        yield made


def broken(stage, scenario, operation, count):
    """The promises that did not hold."""
    chosen = [each for each in OPERATIONS if each.name == operation]
    (row,) = campaign.rows(stage, campaign.named([scenario]), chosen, kills=0, seed=SEED, least=count)
    if row.skipped:
        pytest.skip(row.skipped)
    assert row.runs == count
    return row.broken


@pytest.mark.parametrize(("scenario", "operation"), MANY)
def test_runs_that_are_killed(stage, scenario, operation):
    assert broken(stage, scenario, operation, KILLS) == ()


@pytest.mark.parametrize(("scenario", "operation"), ONCE)
def test_every_other_fault(stage, scenario, operation):
    assert broken(stage, scenario, operation, 1) == ()


def test_every_scenario_has_a_short_form():
    long = {
        "ray-worker"
    }  # starting Ray takes longer than all others together; tests/engine kills its workers
    assert {name for name, _ in [*ONCE, *MANY]} | long == {each.name for each in campaign.SCENARIOS}


def test_a_promise_that_does_not_hold_is_told(stage, monkeypatch):
    """The campaign itself: inputs that are not as they were, and outputs that are not whole, are seen."""
    operation = OPERATIONS[0]
    stage.prepare(operation)
    folder = stage.fresh()
    assert list(stage.broken(operation, folder)) == []
    (folder / operation.output).write_bytes(b"half")
    monkeypatch.setattr(stage, "inputs", {})
    assert list(stage.broken(operation, folder)) == [
        "an input has changed",
        "a file has the output's name and is not whole",
    ]
    stage.done(folder)


def test_names_that_there_are_not():
    with pytest.raises(ValueError, match="there is no scenario 'kil'; there are kill-moments"):
        campaign.named(["kil"])
    with pytest.raises(
        ValueError, match="there is no operation 'pack'; there are bake, extract, merge, resize"
    ):
        campaign.operations_of(["pack"])
