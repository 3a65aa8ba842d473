"""Extract, merge and resize that are killed and gone on with: the same bytes, and only what is missing done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import factories
import pytest

from loratools.engine import kept
from loratools.errors import OptionError
from loratools.io import work_folder
from loratools.io.work_folder import place_of
from loratools.ops.extract import extract
from loratools.ops.merge import merge_files
from loratools.ops.resize import resize_file
from tests.engine.processes import Processes
from tests.ops import checkpoints as make

ROOT = Path(__file__).resolve().parents[2]
# The program, which writes down what is done at once, and kills itself when it has done so for the n-th time.
KILLED = """
import os, signal, sys
from loratools.engine import kept
from loratools.io import work_folder
kept._EVERY = work_folder._EVERY = work_folder._FIRST = 0.0
real, left = kept.Kept._settle, [{count}]
def settle(self):
    real(self)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
kept.Kept._settle = settle
from loratools import cli
cli.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters and checkpoints."""
    found = tmp_path_factory.mktemp("resume")
    for seed in (1, 2):
        factories.kohya(found / f"{seed}.safetensors", "sd15", seed=seed, rank=6)
    state = make.llama()
    make.save(state, found / "base.safetensors")
    make.save(make.tuned(state, rank=8), found / "tuned.safetensors")
    return found


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Processes]:
    with Processes() as engine:
        yield engine


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is written down at once, as in a run that takes long."""
    monkeypatch.setattr(kept, "_EVERY", 0.0)
    for name in ("_EVERY", "_FIRST"):
        monkeypatch.setattr(work_folder, name, 0.0)


Run = Callable[..., Any]


def _extract(folder: Path, output: Path, **options: Any) -> Any:
    given = {"size": "12KB", "embeddings": True, **options}
    return extract(folder / "base.safetensors", folder / "tuned.safetensors", output, **given)[1]


def _merge(folder: Path, output: Path, **options: Any) -> Any:
    given = {"method": "ties", "density": 0.5, "rank": 4, **options}
    return merge_files([folder / "1.safetensors", folder / "2.safetensors"], output, **given)


def _resize(folder: Path, output: Path, **options: Any) -> Any:
    return resize_file(folder / "1.safetensors", output, **{"size": "40KB", **options})


RUNS: dict[str, Run] = {"extract": _extract, "merge": _merge, "resize": _resize}
COMMANDS = {
    "extract": ("extract", "base.safetensors", "tuned.safetensors", "--size", "12KB", "--embeddings"),
    "merge": (
        "merge",
        "1.safetensors",
        "2.safetensors",
        "--method",
        "ties",
        "--density",
        "0.5",
        "--rank",
        "4",
    ),
    "resize": ("resize", "1.safetensors", "--size", "40KB"),
}


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of those of a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return {file.name if path.is_dir() else "": file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def wanted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What each run writes that nothing interrupts."""
    here = tmp_path_factory.mktemp("wanted")
    for name, run in RUNS.items():
        run(folder, here / name)
    return {name: contents(here / name) for name in RUNS}


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_is_gone_on_with_to_the_same_bytes(
    folder: Path, tmp_path: Path, wanted: dict[str, dict[str, bytes]], name: str
) -> None:
    inputs = {path: path.read_bytes() for path in folder.iterdir()}
    output = tmp_path / "out"
    code = KILLED.format(count=3)
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMANDS[name], "-o", str(output)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not output.exists()
    assert place_of(output).exists()
    report = RUNS[name](folder, output, resume=True)
    assert report.resumed == 3
    assert any("3 were taken over" in note for note in report.notes)
    assert contents(output) == wanted[name]
    assert not place_of(output).exists()
    assert {path: path.read_bytes() for path in folder.iterdir()} == inputs


@pytest.mark.parametrize("name", RUNS)
def test_bytes_do_not_depend_on_where_tasks_run(
    folder: Path, tmp_path: Path, wanted: dict[str, dict[str, bytes]], elsewhere: Processes, name: str
) -> None:
    report = RUNS[name](folder, tmp_path / "out", engine=elsewhere)
    assert contents(tmp_path / "out") == wanted[name]
    assert report.resumed == 0
    assert not place_of(tmp_path / "out").exists()


class EndedError(Exception):
    """What ends a run."""


def ending(after: int) -> Callable[[str, int, int], None]:
    """Progress that ends a run once so many tasks are done."""
    seen: list[str] = []

    def progress(name: str, *_: int) -> None:
        seen.append(name)
        if len(seen) == after:
            raise EndedError

    return progress


@pytest.mark.parametrize("name", RUNS)
def test_an_error_leaves_what_is_done_to_a_run_that_asked_for_it_and_other_options_are_refused(
    folder: Path, tmp_path: Path, wanted: dict[str, dict[str, bytes]], name: str
) -> None:
    output = tmp_path / "out"
    with pytest.raises(EndedError):
        RUNS[name](folder, output, resume=True, progress=ending(2))
    other = {"size": "30KB"} if name != "merge" else {"rank": 3}
    with pytest.raises(OptionError, match="the interrupted run is another") as caught:
        RUNS[name](folder, output, resume=True, **other)
    assert caught.value.keys
    assert RUNS[name](folder, output, resume=True).resumed >= 1
    assert contents(output) == wanted[name]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", RUNS)
def test_an_error_leaves_nothing_to_a_run_that_did_not_ask_for_it(
    folder: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(EndedError):
        RUNS[name](folder, tmp_path / "out", progress=ending(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", RUNS)
def test_what_is_put_away_meanwhile_changes_no_byte(
    folder: Path, tmp_path: Path, wanted: dict[str, dict[str, bytes]], name: str
) -> None:
    RUNS[name](folder, tmp_path / "out")
    assert contents(tmp_path / "out") == wanted[name]


def test_an_input_that_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    given = tmp_path / "in.safetensors"
    given.write_bytes((folder / "1.safetensors").read_bytes())
    with pytest.raises(EndedError):
        resize_file(given, tmp_path / "out", rank=2, resume=True, progress=ending(2))
    os.utime(given, ns=(1, 1))
    with pytest.raises(OptionError, match="the interrupted run is another") as caught:
        resize_file(given, tmp_path / "out", rank=2, resume=True)
    assert caught.value.keys == (f"input {given}",)


def test_a_merge_that_decomposes_nothing_is_done_again(folder: Path, tmp_path: Path) -> None:
    given = [folder / "1.safetensors", folder / "2.safetensors"]
    report = merge_files(given, tmp_path / "out.safetensors", resume=True)
    assert report.resumed == 0
    assert "nothing to resume: this merge decomposes nothing, and was done again" in report.notes
