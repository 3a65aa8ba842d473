"""Tasks side by side: results in order, errors in place, nothing taken far ahead, torch left as it was."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from loratools.engine import local


def test_results_come_in_the_order_of_the_tasks() -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(local.run(work, range(50), threads=4)) == [number * number for number in range(50)]


def test_tasks_run_side_by_side() -> None:
    both = threading.Barrier(2, timeout=20)
    # Neither returns before the other has begun.
    assert list(local.run(lambda _: both.wait() >= 0, range(2), threads=2)) == [True, True]


def test_an_error_is_raised_in_its_place_and_ends_the_run() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        done.append(number)
        return number

    results = local.run(work, range(1000), threads=1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert len(done) < 20


def test_tasks_are_taken_as_results_are_asked_for() -> None:
    taken: list[int] = []

    def tasks():
        for number in range(1000):
            taken.append(number)
            yield number

    results = local.run(lambda number: number, tasks(), threads=2)
    next(results)
    assert len(taken) < 20
    results.close()


def test_each_task_computes_on_one_thread_and_torchs_setting_is_restored() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert set(local.run(lambda _: torch.get_num_threads(), range(8), threads=2)) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_threads_follow_the_usual_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local.default_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert local.default_threads() >= 1


def test_tasks_that_need_much_are_not_taken_ahead_of_each_other() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        return number

    sizes = [10, 10, 10, 90, 500, 10, 10]
    results = local.run(work, range(len(sizes)), threads=2, size=lambda number: sizes[number], most=100)
    for number in range(len(sizes)):
        taken = [each for each in begun if each >= number]
        assert len(taken) <= 1 or sum(sizes[each] for each in taken) <= 100
        assert next(results) == number
    assert sorted(begun) == list(range(len(sizes)))
