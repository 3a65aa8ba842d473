"""Predictions: what they are made of, and that measuring leaves nothing behind."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from loratools.engine import Item, Plan
from loratools.engine import _predict_probe as probe
from loratools.engine import predict as predicting
from loratools.engine._cut import cut
from loratools.engine._predict_tasks import Sample, crowding, line, sized, timed_tasks
from loratools.engine.predict import Rates, Speed, measure, predict

RATES = Rates(
    Speed(100.0, 150.0), Speed(50.0, 50.0, behind=True), {"svd": 0.5}, {"svd": 1.0}, run=7.0, process=1000
)
ITEMS = [Item("a", 200, 100, memory=30, cost=4, kind="svd"), Item("b", 100, 50, memory=20, kind="copy")]


def test_a_prediction_adds_up():
    found = predict(ITEMS, RATES, 1)
    # a: 2 s read, 1 + 2 s computed, 2 s given; b: 1 s read, 1 s given; the storage is done a second after that.
    assert found.seconds == pytest.approx(7 + (2 + 3 + 2) + (1 + 1) + 1)
    assert (found.workers, found.sequential, found.tasks, found.batches) == (1, 7.0, 2, 2)
    assert (found.read, found.written) == (300, 150)
    assert (found.memory, found.peak) == (1030, 1030)
    assert found.bound == pytest.approx(9)
    assert found.efficiency == pytest.approx(9 / 10)


def test_threads_share_a_process_and_processes_do_not():
    assert predict(ITEMS, RATES, 2).peak == 1050
    assert predict(ITEMS, RATES, 2, processes=True).peak == 2050
    assert predict(ITEMS, RATES, 9, processes=True).peak == 2050
    assert predict(ITEMS, RATES, 2, batches=[(0, 1)], processes=True).peak == 1030


def test_processes_are_sent_the_batches_that_an_engine_of_processes_sends():
    assert predict(ITEMS, RATES, 2, processes=True) == predict(
        ITEMS, RATES, 2, batches=cut(ITEMS, 2), processes=True
    )


def test_more_workers_change_neither_bytes_nor_what_is_done_one_after_the_other():
    one, many = predict(ITEMS, RATES, 1), predict(ITEMS, RATES, 64)
    assert (one.read, one.written, one.sequential) == (many.read, many.written, many.sequential)
    assert many.seconds < one.seconds
    assert many.bound >= predicting.bound(ITEMS[:1], RATES, 64)


def test_a_plan_of_nothing_takes_what_a_run_takes():
    found = predict([], RATES, 4)
    assert (found.seconds, found.efficiency, found.memory) == (7.0, 1.0, 1000)


def test_no_workers_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="0 workers"):
        predict(ITEMS, RATES, 0)
    with pytest.raises(KeyError, match="merge"):
        predict([Item("a", cost=1, kind="merge")], RATES, 1)


def test_a_line_is_found_again():
    start, slope = line([Sample(cost, 0.25 + 2.0 * cost) for cost in (1.0, 5.0, 40.0)])
    assert (start, slope) == (pytest.approx(0.25), pytest.approx(2.0))


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([(4.0, 2.0)], (0.0, 0.5)),  # one task: in proportion
        ([(4.0, 2.0), (4.0, 2.0)], (0.0, 0.5)),
        ([(0.0, 2.0), (0.0, 2.0)], (2.0, 0.0)),  # nothing computes
    ],
)
def test_what_gives_no_line_is_taken_in_proportion(samples, expected):
    assert line([Sample(*each) for each in samples]) == pytest.approx(expected)


@pytest.mark.parametrize("samples", [[(1.0, 1.0), (2.0, 9.0)], [(1.0, 9.0), (2.0, 1.0)]])
def test_neither_operations_nor_tasks_take_less_than_no_time(samples):
    start, slope = line([Sample(*each) for each in samples])
    assert start == 0.0
    assert slope > 0.0


def test_the_smallest_is_tried_and_those_that_make_up_the_work():
    items = [Item(f"{cost}", cost=cost) for cost in (9.0, 1.0, 5.0, 1.0, 80.0)]
    assert sized(range(5), items) == [1, 4, 0]
    even = [Item(f"{number}") for number in range(8)]
    assert sized(range(8), even) == [0, 3, 5, 1, 6, 2, 4, 7]


def _plan(work, costs, **options):
    items = [Item(f"{number}", cost=cost, kind="k") for number, cost in enumerate(costs)]
    return Plan(work, list(costs), items, **options)


def test_samples_are_run_instead_of_the_work_where_there_are_any():
    seen: list[float] = []
    plan = _plan(lambda _: pytest.fail("the work was done"), [1.0, 2.0], sample=seen.append)
    timed_tasks(plan, 1e9, 1.0)
    assert seen == [1.0, 1.0, 2.0]


def test_what_would_take_too_long_is_not_tried():
    seen: list[float] = []

    def work(cost: float) -> None:
        seen.append(cost)
        time.sleep(0.01)

    operation, task, _ = timed_tasks(_plan(work, [1e6, 1e12]), 1e9, 0.1)
    assert seen == [1e6, 1e6]
    assert operation["k"] * 1e6 + task["k"] >= 0.01
    assert operation["k"] * 1e12 < 10_000  # as in proportion to 10 ms for a million


def test_what_a_tiny_task_takes_is_not_held_for_its_operations():
    operation, task, _ = timed_tasks(_plan(lambda _: time.sleep(0.005), [1.0, 1e8]), 1e9, 2.0)
    assert operation["k"] < 1e-4  # not 5 ms, as of the tiny one
    assert operation["k"] * 1e8 + task["k"] >= 0.0045


def test_the_time_for_reading_is_not_counted_twice():
    items = [Item("a", read=1000, cost=1.0, kind="k")]
    plan = Plan(lambda _: time.sleep(0.02), [0], items)

    def own(bandwidth: float) -> float:
        found = timed_tasks(plan, bandwidth, 1.0)
        return found.operation["k"] + found.task["k"]

    assert own(1e12) >= 0.0199
    assert own(1000.0) < 0.0199


def test_a_storage_is_no_slower_than_a_task_has_read():
    items = [Item("a", read=10**9, cost=1.0, kind="k")]
    plan = Plan(lambda _: time.sleep(0.01), [0], items)
    assert timed_tasks(plan, 1.0, 1.0).bandwidth > 1e7
    assert timed_tasks(plan, 1e15, 1.0).bandwidth == 1e15


def test_tasks_that_wait_for_one_another_are_seen_to_do_so():
    turn = threading.Lock()

    def work(_: float) -> None:
        with turn:
            time.sleep(0.002)

    plan = _plan(work, [1.0, 1.0])
    assert crowding(plan, lambda _: 0.002, 3, 0.2) > 1.5
    assert crowding(plan, lambda _: 0.002, 1, 0.2) == 1.0


def test_what_takes_too_long_or_too_much_memory_is_not_tried_side_by_side():
    plan = _plan(lambda _: pytest.fail("it was run"), [1.0])
    assert crowding(plan, lambda _: 9.0, 2, 1.0) == 1.0
    items = [Item("a", memory=100, cost=1.0, kind="k")]
    large = Plan(lambda _: pytest.fail("it was run"), [0], items)
    assert crowding(large, lambda _: 0.01, 2, 1.0, most=150) == 1.0


def test_crowded_workers_compute_longer():
    items = [Item(f"{number}", cost=1.0) for number in range(4)]
    alone = Rates(Speed(1e12), Speed(1e12), {"": 1.0}, {})
    assert predict(items, alone, 2).seconds == pytest.approx(2.0)
    assert predict(items, alone._replace(crowding=1.5), 2).seconds == pytest.approx(3.0)


def test_measuring_leaves_nothing_behind(tmp_path):
    source = tmp_path / "in"
    source.write_bytes(bytes(1 << 20))
    items = [Item("a", read=1 << 20, written=1 << 20, cost=1.0, kind="k")]
    threads = torch.get_num_threads()
    found = measure(
        Plan(lambda _: None, [0], items), inputs=[source, source], output=tmp_path / "out", planning=3.0
    )
    assert [each.name for each in tmp_path.iterdir()] == ["in"]
    assert torch.get_num_threads() == threads
    assert found.run > 3.0
    assert found.write.behind
    assert 0 < found.read.worker <= found.read.together
    assert found.process > 10 << 20


def test_tasks_are_timed_on_one_thread():
    counts: list[int] = []
    plan = _plan(lambda _: counts.append(torch.get_num_threads()), [1.0])
    measure(plan, inputs=[], output=None)
    assert set(counts) == {1}


def test_what_is_neither_read_nor_written_is_not_tried(tmp_path):
    found = measure(_plan(lambda _: None, [1.0]), inputs=[tmp_path / "absent"], output=None, planning=0.0)
    assert found.read.worker == found.write.worker > 1e11


def test_every_turn_reads_other_places():
    sizes = {"a": 300 << 20, "b": 100 << 20}
    taken = [set(probe._places(list(sizes), sizes, 16 << 20, turn, 3)) for turn in range(3)]
    assert len(taken[0] | taken[1] | taken[2]) == 3 * len(taken[0])
    for path, start, length in taken[0] | taken[1] | taken[2]:
        assert 0 <= start <= start + length <= sizes[path]
