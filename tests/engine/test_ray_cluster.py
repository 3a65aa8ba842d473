"""Bake and extract on two nodes of which one is lost on the way: the output is the local run's, byte for byte."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import loratools as lt
from loratools.engine import Engine, Plan
from loratools.engine.ray import Ray
from loratools.errors import EngineError
from loratools.ops import _bake_plan
from loratools.ops.extract import extract
from tests.engine.nodes import Nodes
from tests.engine.work import Slowed
from tests.ops import checkpoints as make

ray = pytest.importorskip("ray")
PATIENCE = 60.0  # seconds after which something else than the test is wrong
LAYERS = 4


class Inputs(NamedTuple):
    """A model in files and in one, what came of it by tuning, and an adapter of it."""

    base: Path
    one: Path
    tuned: Path
    adapter: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    state: dict[str, torch.Tensor] = {}
    for number in range(LAYERS):
        layer = make.llama(seed=10 * number).items()
        state |= {key.replace("layers.0", f"layers.{number}"): value for key, value in layer}
    base = make.shard(state, folder / "base")
    one = make.save(state, folder / "one.safetensors")
    tuned = make.save(make.tuned(state), folder / "tuned.safetensors")
    lt.save(lt.extract(base, tuned, rank=3), folder / "adapter")
    return Inputs(base, one, tuned, folder / "adapter")


def _bake_folder(given: Inputs, output: Path, engine: Engine | None) -> None:
    lt.bake(given.base, [given.adapter], output, rounding="stochastic", dtype="bfloat16", engine=engine)


def _bake_file(given: Inputs, output: Path, engine: Engine | None) -> None:
    lt.bake(given.one, [given.adapter], output.with_suffix(".safetensors"), engine=engine)


def _extract(given: Inputs, output: Path, engine: Engine | None) -> None:
    extract(given.base, given.tuned, output, rank=2, engine=engine)


OPERATIONS: dict[str, Callable[[Inputs, Path, Engine | None], None]] = {
    "bake a sharded model": _bake_folder,
    "bake a file": _bake_file,
    "extract": _extract,
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if ray.is_initialized():
        ray.shutdown()
    with Nodes() as found:
        yield found


@pytest.fixture(scope="module")
def engine(nodes: Nodes) -> Iterator[Ray]:
    with Ray(nodes.address) as found:
        yield found


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bake_plan, "_TOGETHER", 1)


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


class Losing:
    """Loses something once tasks wait in it, and then lets all go on; a context around the run."""

    def __init__(self, slowed: Slowed, lose: Callable[[], bool]) -> None:
        self._slowed = slowed
        self._lose = lose
        self._problems: list[BaseException] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            until(lambda: self._over.is_set() or self._lose())
        except BaseException as error:
            self._problems.append(error)
        finally:
            self._slowed.let()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        assert not self._problems


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_node_that_is_lost_changes_no_byte(
    inputs: Inputs, nodes: Nodes, engine: Ray, tmp_path: Path, name: str
) -> None:
    (tmp_path / "marks").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    lost = nodes.add()
    slowed = Slowed(engine, str(tmp_path / "marks"))

    def lose() -> bool:
        waiting = {node for node, _ in slowed.marks(waiting=True)}
        if lost.node_id not in waiting or len(waiting) < 2:
            return False
        nodes.kill(lost)
        return True

    with Losing(slowed, lose):
        OPERATIONS[name](inputs, tmp_path / "there/out", slowed)
    begun = len(slowed.marks())
    calm = Counting()
    OPERATIONS[name](inputs, tmp_path / "here/out", calm)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert begun > calm.tasks, "what ran on the node was not begun again"


class Counting:
    """This machine's engine of one thread, as one that runs elsewhere.

    Attributes:
        tasks: How many it has run.
    """

    remote, devices, device_kind = True, (), "cpu"

    def __init__(self) -> None:
        self.tasks = 0

    def run(self, plan: Plan) -> Iterator[tuple[int, object]]:
        for number, task in enumerate(plan.tasks):
            self.tasks += 1
            yield number, plan.work(task)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize("name", ["bake a sharded model", "extract"])
def test_a_worker_that_is_killed_changes_no_byte(
    inputs: Inputs, engine: Ray, tmp_path: Path, name: str
) -> None:
    for each in ("marks", "there", "here"):
        (tmp_path / each).mkdir()
    slowed = Slowed(engine, str(tmp_path / "marks"))
    killed: list[int] = []

    def lose() -> bool:
        for _, process in slowed.marks(waiting=True):
            os.kill(process, signal.SIGKILL)
            killed.append(process)
            return True
        return False

    with Losing(slowed, lose):
        OPERATIONS[name](inputs, tmp_path / "there/out", slowed)
    OPERATIONS[name](inputs, tmp_path / "here/out", None)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert {process for _, process in slowed.marks()} - {*killed}, "nobody did what the worker had"


def test_workers_read_urls_where_the_settings_of_this_process_say(
    inputs: Inputs, engine: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    import hub_server

    with hub_server.running() as hub:
        hub_server.point_to(hub, monkeypatch, tmp_path / "home")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)  # which the nodes were started without
        hub.add("org/model", contents(inputs.base))
        hub.add("org/adapter", contents(inputs.adapter))
        lt.bake("hf://org/model", ["hf://org/adapter"], tmp_path / "there", engine=engine)
    lt.bake(inputs.base, [inputs.adapter], tmp_path / "here")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_url_that_means_nothing_to_other_processes_is_told(
    inputs: Inputs, engine: Ray, tmp_path: Path
) -> None:
    fsspec = pytest.importorskip("fsspec")
    url = "memory://loratools-nodes/adapter"
    for name, data in contents(inputs.adapter).items():
        fsspec.filesystem("memory").pipe(f"/loratools-nodes/adapter/{name}", data)
    with pytest.raises(EngineError, match=r"does not see it.*same files under the same names") as caught:
        lt.bake(inputs.base, [url], tmp_path / "out", engine=engine)
    assert caught.value.path == f"{url}/adapter_model.safetensors"
    assert not list(tmp_path.iterdir())
