"""The simulation of workers that share a storage: against arithmetic, a slower twin, and bounds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.engine import Item
from loratools.engine._cut import cut
from loratools.engine._predict_rates import Rates, Speed
from loratools.engine._predict_schedule import Outcome, simulate
from loratools.engine.predict import bound

FAST = Speed(1e15)


def rates(read: Speed = FAST, write: Speed = FAST, **others: float) -> Rates:
    """A second for each operation, and none for anything else."""
    return Rates(read, write, {"": 1.0}, {"": others.pop("task", 0.0)}, **others)


def seconds(items: list[Item], workers: int, found: Rates | None = None, **options: int) -> float:
    """The time of tasks that are sent one at a time, in order."""
    batches = [(number,) for number in range(len(items))]
    return simulate(items, batches, found or rates(), workers, **options).seconds


def computing(*costs: float) -> list[Item]:
    return [Item(f"{number}", cost=cost) for number, cost in enumerate(costs)]


def reading(*sizes: int) -> list[Item]:
    return [Item(f"{number}", read=size) for number, size in enumerate(sizes)]


def writing(*sizes: int) -> list[Item]:
    return [Item(f"{number}", written=size) for number, size in enumerate(sizes)]


def test_whoever_is_free_takes_the_next():
    items = computing(3, 2, 2, 1)
    assert seconds(items, 1) == pytest.approx(8)
    assert seconds(items, 2) == pytest.approx(4)
    assert seconds(items, 9) == pytest.approx(3)


def test_nothing_takes_no_time():
    assert simulate([], [], rates(), 3) == Outcome(0.0, 0)


def test_transfers_share_what_all_get_together():
    speed = Speed(worker=10.0, together=10.0)
    # Both at 5 bytes a second until the first is done after 8 seconds; then the second, alone, reads 40 more at 10.
    assert seconds(reading(40, 80), 2, rates(read=speed)) == pytest.approx(12)
    assert seconds(reading(40, 80), 1, rates(read=speed)) == pytest.approx(12)


def test_no_worker_gets_more_than_one_can():
    speed = Speed(worker=10.0, together=25.0)
    assert seconds(reading(100), 1, rates(read=speed)) == pytest.approx(10)
    assert seconds(reading(100, 100), 2, rates(read=speed)) == pytest.approx(10)
    assert seconds(reading(*[100] * 5), 5, rates(read=speed)) == pytest.approx(20)


def test_reading_and_writing_do_not_share():
    items = [Item("a", read=10), Item("b", written=10)]
    assert seconds(items, 2, rates(Speed(1.0, 1.0), Speed(1.0, 1.0))) == pytest.approx(10)


def test_what_is_written_behind_a_worker_has_to_be_there_in_the_end():
    ahead = rates(write=Speed(worker=10.0, together=1.0, behind=True))
    # Taken in a second each, brought to the storage in ten each.
    assert seconds(writing(10, 10), 1, ahead) == pytest.approx(21)
    assert seconds(writing(10, 10), 1, rates(write=Speed(10.0, 1.0))) == pytest.approx(20)
    assert seconds([Item("a", written=10), Item("b", cost=50)], 1, ahead) == pytest.approx(51)


def test_tasks_and_batches_have_their_own_seconds():
    items = computing(1, 1, 1, 1)
    slow = rates(task=0.5, batch=2.0)
    assert simulate(items, [(0, 1, 2, 3)], slow, 1).seconds == pytest.approx(8)
    assert simulate(items, [(0,), (1,), (2,), (3,)], slow, 1).seconds == pytest.approx(14)


def test_memory_is_that_of_the_largest_task_of_each_batch_under_way():
    items = [Item(f"{size}", memory=size, cost=1) for size in (5, 3, 2)]
    assert simulate(items, [(0,), (1,), (2,)], rates(), 1).peak == 5
    assert simulate(items, [(0,), (1,), (2,)], rates(), 2).peak == 8
    assert simulate(items, [(0, 1), (2,)], rates(), 2).peak == 7


def test_a_limit_of_memory_holds_tasks_back():
    items = [Item(f"{number}", memory=6, cost=1) for number in range(4)]
    assert seconds(items, 2, most=12) == pytest.approx(2)
    assert seconds(items, 2, most=11) == pytest.approx(4)
    assert seconds(items, 2, most=1) == pytest.approx(4)


ITEMS = st.lists(
    st.builds(
        Item,
        st.just("t"),
        read=st.integers(0, 50),
        written=st.integers(0, 50),
        memory=st.integers(0, 9),
        cost=st.floats(0, 20),
        kind=st.just(""),
    ),
    min_size=1,
    max_size=30,
)
SPEEDS = st.builds(Speed, st.floats(1, 20), st.floats(1, 60), st.just(False))
BEHIND = st.builds(Speed, st.floats(1, 20), st.floats(1, 60), st.booleans())


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(1, 8), SPEEDS, SPEEDS)
def test_the_slower_twin_agrees(items, workers, read, write):
    batches = cut(items, workers)
    found = rates(read, write, task=0.25)
    assert simulate(items, batches, found, workers).seconds == pytest.approx(
        _twin(items, batches, found, workers), abs=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(1, 8), SPEEDS, BEHIND)
def test_nothing_undercuts_the_bound(items, workers, read, write):
    found = rates(read, write)
    batches = cut(items, workers)
    assert simulate(items, batches, found, workers).seconds >= bound(items, found, workers) * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(1, 8))
def test_without_a_shared_storage_a_run_takes_the_mean_and_the_longest_batch_at_most(items, workers):
    batches = cut(items, workers)
    alone = [sum(rates().alone(items[number]) for number in batch) for batch in batches]
    longest = sum(alone) / workers + max(alone) * (1 - 1 / workers)  # Graham, 1966
    assert simulate(items, batches, rates(), workers).seconds <= longest * (1 + 1e-9)


def _twin(items: list[Item], batches: list[tuple[int, ...]], found: Rates, workers: int) -> float:
    """The same, with what is left of each step in a list that is gone through for every event."""
    waiting = [[step for number in batch for step in _steps(items[number], found)] for batch in batches]
    busy: list[list[list[float]]] = []
    now = 0.0
    while waiting or busy:
        while waiting and len(busy) < workers:
            busy.append(waiting.pop(0))
        counts = [sum(steps[0][0] == sort for steps in busy) for sort in range(3)]
        speeds = [_rate(found.read, counts[0]), 1.0, _rate(found.write, counts[2])]
        pause = min(steps[0][1] / speeds[int(steps[0][0])] for steps in busy)
        now += pause
        for steps in busy:
            steps[0][1] -= pause * speeds[int(steps[0][0])]
            if steps[0][1] <= 1e-9:
                del steps[0]
        busy = [steps for steps in busy if steps]
    return now


def _steps(item: Item, found: Rates) -> list[list[float]]:
    return [[0, item.read], [1, found.computing(item)], [2, item.written]]


def _rate(speed: Speed, count: int) -> float:
    return min(speed.worker, speed.together / count) if count else math.inf
