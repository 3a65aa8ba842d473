"""``--engine ray`` on the command line: the same output, nothing of Ray's on stdout or stderr, and an orderly end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loratools.engine import Item, Plan
from loratools.engine.ray import Ray
from loratools.io import work_folder
from tests.cli.running import invoke
from tests.ops import checkpoints as make

pytest.importorskip("ray")
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds after which something else than the test is wrong

# The program, whose tasks say when they begin, and wait but for the first ones.
SLOW = """
import os, signal
# A run in the background may have been told to ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
from dataclasses import replace
from loratools import cli
from loratools.engine.ray import Ray
from loratools.ops import _bake_plan
from tests.engine.work import Slowly
_bake_plan._TOGETHER = 1
run = Ray.run
marks, free = os.environ["MARKS"], int(os.environ["FREE"])
Ray.run = lambda self, plan: run(self, replace(plan, work=Slowly(plan.work, marks, free)))
cli.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and adapters."""
    found = tmp_path_factory.mktemp("inputs")
    state = {}
    for number in range(4):
        layer = make.llama(seed=10 * number).items()
        state |= {key.replace("layers.0", f"layers.{number}"): value for key, value in layer}
    make.shard(state, found / "base")
    make.save(make.tuned(state), found / "tuned.safetensors")
    make.save(make.tuned(state, rank=2), found / "other.safetensors")
    for name in ("tuned", "other"):
        arguments = ("extract", found / "base", found / f"{name}.safetensors", "--rank", "4", "--quiet")
        assert invoke(*arguments, "-o", found / f"{name}-lora").exit_code == 0
    return found


COMMANDS: dict[str, tuple[str, ...]] = {
    "bake": ("bake", "base", "tuned-lora", "-o", "OUT"),
    "extract": ("extract", "base", "tuned.safetensors", "--rank", "3", "-o", "OUT"),
    "merge": ("merge", "tuned-lora", "other-lora", "--method", "ties", "-o", "OUT"),
    "resize": ("resize", "tuned-lora", "--rank", "2", "-o", "OUT"),
    "compare": ("compare", "tuned-lora", "other-lora"),
    "pack": ("pack", "tuned-lora", "other-lora", "--for", "vllm", "-o", "OUT"),
}


def given(name: str, folder: Path, out: Path) -> list[str]:
    """A command's arguments."""
    words = (str(folder / word) if (folder / word).exists() else word for word in COMMANDS[name])
    return [str(out) if word == "OUT" else word for word in words]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    """A Ray that this process is connected to, which commands use then."""
    with Ray(workers=2) as engine:
        list(engine.run(Plan(abs, [1], [Item("1")])))
        yield


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_and_writes_with_ray_what_it_does_without(
    started: None, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here = invoke(*given(name, folder, tmp_path / "here/out"), "--json")
    there = invoke(
        *given(name, folder, tmp_path / "there/out"), "--json", "--engine", "ray", "--workers", "2"
    )
    assert (here.exit_code, there.exit_code) == (0, 0), there.stderr
    assert there.stderr == ""
    assert capfd.readouterr() == ("", "")
    of_the_run = {"seconds", "output"}
    said = [json.loads(each.stdout) for each in (here, there)]
    assert [{**each, **dict.fromkeys(of_the_run)} for each in said] == 2 * [
        {**said[0], **dict.fromkeys(of_the_run)}
    ]
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_command_that_starts_a_ray_is_quiet_and_ends_it(folder: Path, tmp_path: Path) -> None:
    arguments = [*given("bake", folder, tmp_path / "out"), "--json", "--engine", "ray", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "loratools", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["files"] == 3


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)


def family(root: int) -> set[int]:
    """All that a process has started, and what they have."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it ended meanwhile
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found = {root}
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are not told by the file system")
@pytest.mark.parametrize(
    ("name", "number", "word", "resume"),
    [
        ("bake", signal.SIGINT, "Interrupted", False),
        ("extract", signal.SIGTERM, "Terminated", True),
    ],
)
def test_a_signal_ends_the_run_its_ray_and_what_it_has_written(
    folder: Path, tmp_path: Path, name: str, number: signal.Signals, word: str, resume: bool
) -> None:
    (tmp_path / "marks").mkdir()
    (tmp_path / "made").mkdir()
    out, marks = tmp_path / "made/out", tmp_path / "marks"
    arguments = given(name, folder, out) + ["--resume"] * resume
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments, "--engine", "ray", "--workers", "2"],
        cwd=ROOT,
        # Of 26 tasks of an extraction, the first two batches have eight each.
        env={**os.environ, "MARKS": str(marks), "FREE": "20" if resume else "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    journal = work_folder.place_of(out) / "journal"
    ready = lambda: any(marks.glob("*.waits")) and (journal.exists() or not resume)  # noqa: E731
    until(lambda: ready() or child.poll() is not None)
    others = family(child.pid)
    os.killpg(child.pid, number)  # as a terminal's Ctrl-C, `timeout` and schedulers do
    said, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 128 + number, errors
    assert said == ""
    assert word in errors
    assert len(errors.strip().splitlines()) == 1
    assert len(others) > 2
    until(lambda: not any(map(is_running, others)))
    kept = [work_folder.place_of(out).name] if resume else []
    assert [each.name for each in out.parent.iterdir()] == kept
    if resume:
        found = invoke(*given(name, folder, out), "--resume", "--json")
        assert json.loads(found.stdout)["resumed"] > 0
        assert [each.name for each in out.parent.iterdir()] == ["out"]
