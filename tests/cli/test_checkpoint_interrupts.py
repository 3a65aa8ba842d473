"""Runs that are ended while they write, and disks that are full: inputs whole, and no part of an output left."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loratools.engine import _kept_parts, kept
from loratools.io import _output
from tests.cli import checkpoint_files as make
from tests.cli.running import invoke
from tests.ops import sd15_checkpoints

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and resource limits")

# The program, ended by a signal when it is about to write for the n-th time.
ENDED = """
import os, signal, sys
from loratools.engine import _kept_parts
from loratools.io import _output
real, left = _output.write_at, [{count}]
def write_at(*given):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), {number})
    return real(*given)
_output.write_at = _kept_parts.write_at = write_at
from loratools import cli
cli.main()
"""
# The program, ended by a signal once so many records are in the journal.
ENDED_AFTER_RECORDS = """
import os, signal, sys
from loratools.io import _copier, work_folder
from loratools.io._journal_file import Journal
work_folder._EVERY, _copier._SYNCED = 0.0, 1
real, left = Journal.append, [{count}]
def append(self, records):
    real(self, records)
    left[0] -= len(records)
    if left[0] <= 0:
        os.kill(os.getpid(), {number})
Journal.append = append
from loratools import cli
cli.main()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make.standard(tmp_path)
    (made / "m" / "config.json").write_text("{}")
    sd15_checkpoints.pickle(made / "base.ckpt", sd15_checkpoints.tensors())
    return made


def ended(number, count, *arguments, program=ENDED):
    """The exit status of a command that a signal ends at its n-th write, or after its n-th record."""
    code = program.format(number=int(number), count=count)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode


@pytest.mark.parametrize(
    ("count", "command"),
    [
        (3, ("bake", "base.safetensors", "a.safetensors", "-o", "out.safetensors")),
        (4, ("bake", "base.ckpt", "a.safetensors", "-o", "out.ckpt")),
        (9, ("bake", "m", "a.safetensors", "-o", "out")),
        (5, ("extract", "base.ckpt", "tuned.safetensors", "-o", "out.safetensors")),
    ],
)
def test_a_run_that_is_interrupted_leaves_nothing(folder, count, command, monkeypatch):
    real, left = _output.write_at, iter(range(count, 0, -1))

    def write_at(*given):
        if next(left, 0) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*given)

    monkeypatch.setattr(_output, "write_at", write_at)
    monkeypatch.setattr(_kept_parts, "write_at", write_at)
    monkeypatch.setattr(kept, "_EVERY", 0.0)  # as a run does that takes longer
    # A run in the background may have been told to ignore interrupts.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = make.snapshot(folder)
    try:
        result = invoke(*command)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Interrupted\n")
    assert make.snapshot(folder) == before


def test_a_run_that_a_scheduler_ends_leaves_nothing(folder):
    before = make.snapshot(folder)
    assert ended(signal.SIGTERM, 2, "bake", "m", "a.safetensors", "-o", "out") == 128 + signal.SIGTERM
    assert make.snapshot(folder) == before


def test_a_killed_bake_has_no_output_and_the_next_one_succeeds(folder):
    command = ("bake", "base.ckpt", "a.safetensors", "-o", "out.ckpt")
    before = make.snapshot(folder)
    assert ended(signal.SIGKILL, 3, *command) == -signal.SIGKILL
    after = make.snapshot(folder)
    assert not (folder / "out.ckpt").exists()
    assert {name: after[name] for name in before} == before
    assert (folder / ".out.ckpt.work").is_dir()
    cleaned = invoke("bake", "base.ckpt", "a.safetensors", "-o", "out.ckpt", "--clean")
    assert cleaned.exit_code == 0
    assert ".out.ckpt.work" in cleaned.stdout
    assert make.snapshot(folder) == before
    assert invoke(*command).exit_code == 0
    assert torch.load(folder / "out.ckpt", weights_only=True)["global_step"] == 3


def test_resuming_gives_what_an_uninterrupted_bake_gives(folder):
    command = ("bake", "m", "a.safetensors", "--resume", "-o")
    assert invoke(*command, "whole").exit_code == 0
    before = make.snapshot(folder)
    assert ended(signal.SIGKILL, 1, *command, "out", program=ENDED_AFTER_RECORDS) == -signal.SIGKILL
    assert not (folder / "out").exists()
    assert (folder / ".out.work" / "journal").exists()
    result = invoke(*command, "out")
    assert result.exit_code == 0
    assert re.search(r"resumed +\d+ tasks? of the interrupted run taken over", result.stdout)
    after = make.snapshot(folder)
    assert {name: after[name] for name in before} == before
    assert make.snapshot(folder / "out") == make.snapshot(folder / "whole")
    assert not any(name.startswith(".") for name in after)


@contextlib.contextmanager
def no_file_above(size):
    """No file may grow beyond a size in bytes, as on a disk that is full."""
    import resource  # POSIX alone has it

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "command",
    [
        ("bake", "base.safetensors", "a.safetensors", "-o", "out.safetensors"),
        ("bake", "base.ckpt", "a.safetensors", "-o", "out.ckpt"),
        ("bake", "m", "a.safetensors", "-o", "out"),
        ("bake", "m", "a.safetensors", "-o", "m", "--overwrite"),
        ("bake", "base.safetensors", "a.safetensors", "-o", "base.safetensors", "--overwrite"),
        ("extract", "base.ckpt", "tuned.safetensors", "-o", "out.safetensors"),
        ("extract", "base.ckpt", "tuned.safetensors", "-o", "out.safetensors", "--size", "20KB"),
    ],
)
def test_a_full_disk_leaves_nothing_and_says_where(folder, command):
    goal = command[command.index("-o") + 1]
    with no_file_above(9_000):
        found = make.refused(folder, *command)
    assert goal in found or f"{folder}: a temporary file" in found
    assert "cannot be written: " in found
    assert "Make room" in found
