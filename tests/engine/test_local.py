"""Tasks side by side: results in order, errors in place, nothing taken far ahead, torch left as it was."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from loratools.engine import Item, Plan, local, memory
from loratools.engine.ordered import in_order
from loratools.errors import EngineError


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


def test_a_plan_is_done_in_its_order_within_memory() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        return -number

    half = memory.installed() // 2
    assert half > 0
    items = [Item(str(number), memory=half // 2 + 1) for number in range(6)]
    results = local.Local(4).run(Plan(work, list(range(6)), items))
    for number in range(6):
        assert next(results) == (number, -number)
        assert len(begun) <= number + 2, "no two of them fit beside each other"
    assert not local.Local(4).remote


def test_each_device_has_a_thread_of_its_own_which_takes_the_next_task() -> None:
    both = threading.Barrier(2, timeout=20)
    seen: list[tuple[int, str, int]] = []

    def work(task: tuple[int, str]) -> str:
        number, device = task
        if number < 2:
            both.wait()
        seen.append((number, device, threading.get_ident()))
        return device

    tasks = [(number, "") for number in range(12)]
    items = [Item(str(number)) for number in range(12)]
    plan = Plan(work, tasks, items, bind=lambda task, device: (task[0], device))
    found = dict(local.Local(devices=("cuda:0", "cuda:1")).run(plan))
    assert set(found.values()) == {"cuda:0", "cuda:1"}
    assert len(found) == 12
    by_device = {device: {thread for _, own, thread in seen if own == device} for device in found.values()}
    assert all(len(threads) == 1 for threads in by_device.values())


def test_tasks_that_no_device_can_do_run_on_the_cpus() -> None:
    plan = Plan(lambda task: task, ["a", "b"], [Item("a"), Item("b")])
    assert list(local.Local(2, ("cuda:0",)).run(plan)) == [(0, "a"), (1, "b")]


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local.present() == ("cuda:0", "cuda:1")
    assert local.present(["cuda:1"]) == ("cuda:1",)
    with pytest.raises(EngineError, match="finds 2 GPUs") as caught:
        local.present(["cuda:0", "cuda:4"])
    assert caught.value.keys == ("cuda:4",)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(EngineError, match="finds 0 GPUs"):
        local.present()


def test_results_are_put_in_order_as_soon_as_they_can_be() -> None:
    came: list[int] = []

    def results():
        for number in (2, 0, 1, 4, 3):
            came.append(number)
            yield number, str(number)

    ordered = in_order(results())
    assert next(ordered) == "0"
    assert came == [2, 0]
    assert list(ordered) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("texts", [["1048576\n", None], [None, "1048576"], ["max\n", "1048576"]])
def test_a_container_has_less_memory_than_its_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, texts: list[str | None]
) -> None:
    for number, text in enumerate(texts):
        if text is not None:
            (tmp_path / str(number)).write_text(text)
    monkeypatch.setattr(memory, "_LIMITS", [str(tmp_path / str(number)) for number in range(2)])
    assert memory.installed() == 1 << 20
