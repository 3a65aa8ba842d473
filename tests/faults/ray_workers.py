"""A worker of Ray that is killed while it works: what it had is done again, and the output has the same bytes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.faults.full_disks import CannotError
from tests.faults.stage import ROOT, Operation, Stage

_PROC = Path("/proc")
_AT_WORK = b"ray::run_batch"  # as Ray calls its processes while they run a task
_PATIENCE = 120.0  # s in which a run with a Ray of its own ends
_POLL = 0.005  # s


def lost_worker(stage: Stage, operation: Operation, count: int, _: Random) -> Iterator[list[str]]:
    """One of two workers of --engine ray is killed while it runs a task: the output has the local run's bytes."""
    if importlib.util.find_spec("ray") is None:
        raise CannotError("ray is not installed")
    if not _PROC.is_dir():
        raise CannotError("processes are not told by the file system")
    for _number in range(count):
        folder = stage.fresh()
        said, code, killed = _run(operation, folder)
        broken = list(stage.broken(operation, folder))
        if not killed:
            broken.append(f"no worker was found at work ({code}): {said}")
        elif code != 0 or not stage.is_whole(operation, folder):
            broken.append(f"the run fails ({code}): {said}")
        if stage.left(operation, folder):
            broken.append(f"left behind: {stage.left(operation, folder)}")
        stage.done(folder)
        yield broken


def _run(operation: Operation, folder: Path) -> tuple[str, int, bool]:
    """What the run printed last, its exit status, and whether one of its workers was killed."""
    command = [sys.executable, "-m", "loratools", *operation.arguments, "-o", operation.output]
    command += ["--engine", "ray", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = False
    end = time.monotonic() + _PATIENCE
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not killed and time.monotonic() < end:
            killed = _kill_one(process.pid)
            time.sleep(_POLL)
        try:
            _, said = process.communicate(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
    return said.strip().rpartition("\n")[2], process.returncode, killed


def _kill_one(ancestor: int) -> bool:
    """Kill a process that runs a task and descends from another; whether there was one."""
    for folder in _PROC.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            at_work = (folder / "cmdline").read_bytes().startswith(_AT_WORK)
            if at_work and _descends(int(folder.name), ancestor):
                os.kill(int(folder.name), signal.SIGKILL)
                return True
        except OSError:  # it ended meanwhile
            continue
    return False


def _descends(process: int, ancestor: int) -> bool:
    while process > 1 and process != ancestor:
        status = (_PROC / str(process) / "stat").read_text()
        process = int(status.rpartition(")")[2].split()[1])
    return process == ancestor
