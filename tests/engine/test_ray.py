"""The engine of Ray: all results whatever is lost, errors as they were raised, nothing left running, stdout clean."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loratools.engine import Item, Plan
from loratools.engine import ray as engine
from loratools.engine._ray_session import joined, left
from loratools.engine._ray_worker import Common, Here, common, here, prepare, run_batch
from loratools.engine.ray import Ray
from loratools.errors import EngineError, LoraError, MissingFileError, NonFiniteError
from tests.engine import work
from tests.engine.work import Task, plan_of

ray = pytest.importorskip("ray")
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds after which something else than the test is wrong


@pytest.fixture(scope="module")
def two() -> Iterator[Ray]:
    with Ray(workers=2) as found:
        yield found


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)


def test_every_result_comes_with_its_number(two: Ray) -> None:
    tasks = [Task(number) for number in range(30)]
    small = Plan(work.square, tasks, [Item(str(number), read=1) for number in range(30)])
    for plan in (small, plan_of(work.square, tasks)):
        assert dict(two.run(plan)) == {number: number**2 for number in range(30)}
    assert two.remote


def test_workers_compute_with_one_thread_and_no_gpu_that_was_not_asked_for(two: Ray) -> None:
    plan = plan_of(work.where, [Task(0)])
    assert dict(two.run(Plan(plan.work, plan.tasks, plan.items, bind=work.bound))) == {0: ("", 1)}


def test_an_error_of_a_task_comes_as_it_was_raised(two: Ray) -> None:
    with pytest.raises(NonFiniteError) as caught:
        list(two.run(plan_of(work.refused, [Task(number) for number in range(40)])))
    error = caught.value
    assert (error.path, error.keys, error.problem) == ("a.safetensors", ("k",), "two")
    assert (error.expected, error.todo) == ("Others were expected", "Train anew")
    assert "in refused" in str(error.__cause__)


def test_an_error_that_cannot_be_sent_is_told(two: Ray) -> None:
    with pytest.raises(EngineError, match="ValueError: has a lock"):
        list(two.run(plan_of(work.unpicklable, [Task(0)])))


def test_what_a_lost_worker_had_is_done_again(two: Ray, tmp_path: Path) -> None:
    tasks = [Task(number, str(tmp_path)) for number in range(6)]
    assert dict(two.run(plan_of(work.crash_once, tasks))) == {number: number**2 for number in range(6)}
    assert (tmp_path / "crashed").exists()


def test_a_task_that_kills_every_worker_is_given_up_with_its_name(
    two: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_RETRIES", 1)
    with pytest.raises(EngineError, match="WorkerCrashedError") as caught:
        list(two.run(plan_of(work.crash, [Task(0)])))
    assert caught.value.keys == ("0",)
    assert caught.value.todo


def test_a_file_that_a_worker_does_not_see_is_told_apart_from_one_that_is_not_there(
    two: Ray, tmp_path: Path
) -> None:
    here_only = tmp_path / "a.safetensors"
    here_only.touch()
    with pytest.raises(EngineError, match=r"does not see it.*same files under the same names") as caught:
        list(two.run(plan_of(work.unseen, [Task(0, str(here_only))])))
    assert caught.value.path == str(here_only)
    with pytest.raises(MissingFileError):
        list(two.run(plan_of(work.unseen, [Task(0, str(tmp_path / "b"))])))


def test_a_task_that_asks_for_more_memory_than_there_is_has_a_node_for_itself(two: Ray) -> None:
    assert dict(two.run(plan_of(work.square, [Task(3)], memory=1 << 50))) == {0: 9}


def test_gpus_that_are_not_there_are_refused() -> None:
    with Ray(workers=1, gpus=True) as found:
        plan = plan_of(work.where, [Task(0)])
        with pytest.raises(EngineError, match="no node of the Ray cluster has a GPU"):
            list(found.run(Plan(plan.work, plan.tasks, plan.items, bind=work.bound)))


def test_a_worker_with_another_version_refuses_to_work() -> None:
    with pytest.raises(EngineError, match=r"has torch .*torch 0\.1") as caught:
        prepare(here()._replace(torch="0.1"))
    assert "same versions" in caught.value.todo
    done = run_batch(Common(Here("0", "0", "/"), b"of another version"), b"")
    assert not done.results
    assert isinstance(done.error, EngineError)


def test_a_worker_with_another_type_of_processor_refuses_to_work() -> None:
    with pytest.raises(EngineError, match=r"has a processor of type .*Abacus, as whoever sends") as caught:
        prepare(here()._replace(processor="Abacus"))
    assert "ATEN_CPU_CAPABILITY" in caught.value.todo


def test_a_task_is_bound_to_the_gpu_that_ray_shows() -> None:
    done = run_batch(common(work.where, work.bound), pickle.dumps([(4, Task(1))]))
    assert done.results == [(4, ("cuda:0", 1))]


@pytest.mark.parametrize("memory", [0, 1, 7, 100, 1 << 30, (1 << 30) + 1, 5_000_000_001])
def test_memory_is_asked_for_in_few_sizes(memory: int) -> None:
    found = engine.rounded(memory)
    assert memory <= found <= memory * 1.25 + 1
    assert engine.rounded(found) == found


def test_all_errors_can_be_sent() -> None:
    classes = [LoraError, *LoraError.__subclasses__()]
    assert len(classes) > 10
    for each in classes:
        error = each("what...", path="a", keys=["k", "l"], candidates=["c"], expected="e", todo="t")
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is each
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379"])
def test_an_address_that_nobody_listens_at_is_refused_soon(address: str) -> None:
    if ray.is_initialized():
        ray.shutdown()
    with (
        pytest.raises(EngineError, match=f"no Ray can be reached at {address}") as caught,
        Ray(address) as found,
    ):
        list(found.run(plan_of(work.square, [Task(0)])))
    assert "ray status" in caught.value.todo


def test_ray_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'loratools\[ray\]'"), Ray():
        pass


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No Ray is started; what is called instead."""
    if ray.is_initialized():
        ray.shutdown()
    calls: list[str] = []
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    return calls


def test_signals_are_the_callers_while_ray_starts(apart: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        ray._private.utils.set_sigterm_handler(lambda *said: sys.exit(15))
        apart.append("own" if signal.getsignal(signal.SIGTERM) is before else "another")

    before = signal.getsignal(signal.SIGTERM)
    handler = ray._private.utils.set_sigterm_handler
    monkeypatch.setattr(ray, "init", init)
    joined(None, 1, debug=False)
    left(ray)
    assert apart == ["own", "shutdown"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert ray._private.utils.set_sigterm_handler is handler


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConnectionError("nobody there")])
def test_what_has_started_is_ended_where_ray_does_not_start(
    apart: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def init(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else EngineError):
        joined(None, 1, debug=False)
    assert apart == ["shutdown"]


SCRIPT = """
import signal, sys
# A run in the background may have been told to ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
from loratools.engine.ray import Ray
from tests.engine import work
with Ray(workers=1) as found:
    print("begun", flush=True)
    list(found.run(work.plan_of(work.slow, [work.Task(number, sys.argv[1]) for number in range(3)])))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_ends_the_run_and_what_it_has_started_and_stdout_stays_clean(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: list(tmp_path.iterdir()))
    (worker,) = [int(each.suffix[1:]) for each in tmp_path.iterdir()]
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode != 0
    assert out == "begun\n"
    assert "KeyboardInterrupt" in errors
    until(lambda: not running(worker))


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
