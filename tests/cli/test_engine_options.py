"""--engine, --ray-address, --workers and --devices: what they mean, and what contradicts what."""

from __future__ import annotations

import json
import os
from pathlib import Path

import factories
import pytest

from loratools.engine.local import Local
from loratools.engine.ray import Ray
from loratools.ops import compare as operation
from tests.cli.running import invoke


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [factories.peft(tmp_path / name, seed=seed).path for seed, name in enumerate("ab")]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the operation was given; it does nothing."""
    said: dict[str, object] = {}

    def compare(paths: object, **options: object) -> None:
        said.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(operation, "compare", compare)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        monkeypatch.setenv(variable, "2")
    return said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--engine", "local", "--ray-address", "auto"], "--engine is local"),
        (["--engine", "ray", "--devices", "cuda:0"], "give --device cuda"),
        (["--ray-address", "auto", "--devices", "all"], "give --device cuda"),
        (["--engine", "ray", "--device", "cuda:1"], "give --device cuda"),
        (["--engine", "ray", "--device", "mps"], "give --device cuda"),
        (["--devices", "cuda:0", "--device", "cpu"], "Leave one of them away"),
        (["--devices", "cuda:0", "--workers", "2"], "Leave --workers away"),
        (["--workers", "2", "--threads", "2"], "Leave one of them away"),
        (["--devices", "cuda:0,cuda:0"], "twice"),
        (["--devices", "gpu"], "cuda:0,cuda:1, or all"),
        (["--ray-address", "head"], "HOST:PORT"),
        (["--ray-address", "http://head:80"], "HOST:PORT"),
        (["--workers", "0"], "--workers"),
        (["--engine", "dask"], "local"),
    ],
)
def test_what_contradicts_itself_is_a_usage_error_that_says_what_to_do(
    pair: list[Path], options: list[str], told: str
) -> None:
    found = invoke("compare", *pair, *options)
    assert found.exit_code == 2
    assert told in " ".join(found.stderr.split())


def test_without_options_there_is_no_engine(pair: list[Path], given: dict[str, object]) -> None:
    invoke("compare", *pair)
    assert given["engine"] is None
    assert given["device"] == "auto"


def test_workers_here_are_threads(pair: list[Path], given: dict[str, object]) -> None:
    invoke("compare", *pair, "--workers", "1", "--engine", "local")
    assert given["engine"] is None
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_devices_make_a_local_engine_that_decides_where_to_compute(
    pair: list[Path], given: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    invoke("compare", *pair, "--devices", "all")
    assert given["engine"] == Local(devices=("cuda:0", "cuda:1"))
    invoke("compare", *pair, "--devices", "cuda:1")
    assert given["engine"] == Local(devices=("cuda:1",))
    assert given["device"] == "auto"


def test_a_device_that_is_not_there_is_refused(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    found = invoke("compare", *pair, "--devices", "cuda:7")
    assert found.exit_code == 1
    assert "finds 0 GPUs here (cuda:7)" in found.stderr


@pytest.mark.parametrize(
    "options", [["--engine", "ray"], ["--ray-address", "auto"], ["--ray-address", "[::1]:6379"]]
)
def test_ray_is_begun_with_the_work_and_left_with_the_command(
    pair: list[Path], given: dict[str, object], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    pytest.importorskip("ray")
    left: list[object] = []
    leave = Ray.__exit__
    monkeypatch.setattr(Ray, "__exit__", lambda self, *error: (left.append(self), leave(self, *error))[1])
    assert invoke("compare", *pair, "--device", "cuda", *options).exit_code == 130
    assert isinstance(given["engine"], Ray)
    assert left == [given["engine"]]
    assert given["device"] == "auto", "each worker takes a GPU that is free"


def test_a_command_that_computes_on_cpus_has_no_devices(tmp_path: Path) -> None:
    for command in ("pack", "verify"):
        assert "--devices" not in invoke(command, "--help").stdout
        assert "--ray-address" in invoke(command, "--help").stdout


def test_ray_gives_what_this_machine_gives(pair: list[Path]) -> None:
    pytest.importorskip("ray")
    here = invoke("compare", *pair, "--json")
    there = invoke("compare", *pair, "--json", "--engine", "ray", "--workers", "1")
    assert there.exit_code == 0, there.stderr
    assert json.loads(there.stdout) == json.loads(here.stdout)
