"""Where runs take place: inputs, a folder for each run, a forked process, and what has to hold after it."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tests.faults import child, inputs

ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 120.0  # s: a run takes seconds; one that hangs is a promise broken
_HANGS = -1000  # the exit status of a run that did not end by itself


class Operation(NamedTuple):
    """What is run.

    Attributes:
        name: As the table has it.
        arguments: Of the program, without the output; inputs are relative to a run's folder.
        output: Its name in a run's folder.
        reads: The input that a fault changes, relative to the inputs' folder.
        mapped: Whether that input is mapped into memory, so that shortening it may end the process.
        other: Further options with which it writes something else.
    """

    name: str
    arguments: tuple[str, ...]
    output: str
    reads: str
    mapped: bool
    other: tuple[str, ...]


_A, _B = "../../in/a", "../../in/b"
_FACTORS = "a/adapter_model.safetensors"
OPERATIONS = (
    Operation(
        "bake",
        ("bake", "../../in/base.safetensors", _A),
        "out.safetensors",
        "base.safetensors",
        False,
        ("--weights", "0.5"),
    ),
    Operation(
        "bake sharded",
        ("bake", "../../in/model", _A),
        "out",
        "model/model-00001-of-0000{}.safetensors",
        False,
        ("--weights", "0.5"),
    ),
    Operation(
        "extract",
        ("extract", "../../in/base.safetensors", "../../in/tuned.safetensors", "--rank", "4", "--to", "peft"),
        "out",
        "tuned.safetensors",
        False,
        ("--rank", "3"),
    ),
    Operation(
        "merge",
        ("merge", _A, _B, "--method", "ties", "--rank", "8"),
        "out",
        _FACTORS,
        True,
        ("--rank", "4"),
    ),
    Operation("resize", ("resize", _A, "--energy", "0.9"), "out", _FACTORS, True, ("--energy", "0.5")),
)


class Ended(NamedTuple):
    """How a run ended.

    Attributes:
        code: Its exit status, or the signal's number, negated.
        said: The last line that it printed.
        seconds: How long it took.
    """

    code: int
    said: str
    seconds: float

    @property
    def refused(self) -> bool:
        """Whether it failed in order: by a message that is none of a fault in the program."""
        return self.code == 1 and "Error: " in self.said and "fault in loratools" not in self.said


class Stage:
    """A folder with inputs and runs; a context that removes it.

    Attributes:
        root: The folder.
        size: Of the inputs.
        measured: Undisturbed runs of which the median is how long one takes, a count.
        references: What an undisturbed run of each operation writes, by name: a digest for each file.
        seconds: How long it takes, by name.
        bytes: What it writes, by name.
        largest: The largest file of it, in bytes, by name.
        calls: How many calls of the system it makes, by name.
        options: Which of --resume and --clean each command has, by name.
    """

    def __init__(self, root: Path, size: inputs.Size, measured: int = 3) -> None:
        self.root = Path(os.path.realpath(root))
        self.size = size
        self.measured = measured
        self.references: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self.largest: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.options: dict[str, frozenset[str]] = {}
        self._numbers = itertools.count()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.faults.child"])

    def __enter__(self) -> Stage:
        self.root.chmod(0o755)  # for runs as another user
        for name in ("in", "runs", "logs"):
            (self.root / name).mkdir()
        (self.root / "logs").chmod(0o777)
        inputs.make(self.root / "in", self.size)
        self.inputs = digests(self.root / "in")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def prepare(self, operation: Operation) -> None:
        """Run an operation undisturbed: what is compared with, and how long it takes.

        Raises:
            RuntimeError: It fails.
        """
        if operation.name in self.references:
            return
        counted = self.root / "logs" / "count"
        found = []
        for _ in range(self.measured):
            folder = self.fresh()
            ended = self.run(operation, folder, counted=str(counted))
            if ended.code != 0:
                raise RuntimeError(f"{operation.name} fails undisturbed: {ended.said}")
            found.append(ended.seconds)
            self.references[operation.name] = written(folder / operation.output)
            sizes = [each.stat().st_size for each in folder.rglob("*") if each.is_file()]
            self.bytes[operation.name], self.largest[operation.name] = sum(sizes), max(sizes)
            self.done(folder)
        self.seconds[operation.name] = statistics.median(found)
        self.calls[operation.name] = int(counted.read_text())
        self.options[operation.name] = _options(operation.arguments[0])

    def fresh(self) -> Path:
        """The folder of a new run."""
        folder = self.root / "runs" / str(next(self._numbers))
        folder.mkdir()
        return folder

    def apart(self) -> Path:
        """The folder of a new run, with inputs of its own two folders above: ``done`` takes those."""
        own = self.root / "apart" / str(next(self._numbers))
        shutil.copytree(self.root / "in", own / "in")
        (own / "runs" / "0").mkdir(parents=True)
        return own / "runs" / "0"

    def done(self, folder: Path) -> None:
        """Remove it."""
        shutil.rmtree(folder, ignore_errors=True)

    def start(
        self, operation: Operation, folder: Path, *more: str, **job: object
    ) -> tuple[BaseProcess, Path]:
        """Begin a run; returns its process and what it prints to."""
        log = self.root / "logs" / f"{next(self._numbers)}.txt"
        arguments = (*operation.arguments, "-o", operation.output, *more)
        process = self._context.Process(
            target=child.run,
            args=(child.Job(arguments, str(folder), str(log), **job),),  # type: ignore[arg-type]
        )
        process.start()
        return process, log

    def run(
        self, operation: Operation, folder: Path, *more: str, kill_after: float | None = None, **job: object
    ) -> Ended:
        """A run, killed after some seconds if it has not ended."""
        started = time.monotonic()
        process, log = self.start(operation, folder, *more, **job)
        process.join(kill_after if kill_after is not None else _PATIENCE)
        hangs = process.is_alive() and kill_after is None
        process.kill()
        return ended(process, log, started, hangs=hangs)

    def whole(self, operation: Operation, folder: Path, kill_after: float) -> Ended:
        """A run as users start it, by the interpreter, killed after some seconds."""
        command = [sys.executable, "-m", "loratools", *operation.arguments, "-o", operation.output]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        started = time.monotonic()
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe) as process:
            try:
                _, said = process.communicate(timeout=kill_after)
            except subprocess.TimeoutExpired:
                process.kill()
                _, said = process.communicate()
        return Ended(process.returncode, _last(said.decode(errors="replace")), time.monotonic() - started)

    def input(self, operation: Operation, folder: Path) -> Path:
        """The input that faults change, of a run in this folder."""
        return folder.parent.parent / "in" / operation.reads.format(self.size.shards)

    def has(self, operation: Operation, option: str) -> bool:
        """Whether the command has an option."""
        return option in self.options[operation.name]

    def broken(self, operation: Operation, folder: Path) -> Iterator[str]:
        """The promises that hold after whatever happened: inputs as they were, and no output that is not whole."""
        if digests(self.root / "in") != self.inputs:
            yield "an input has changed"
        if (folder / operation.output).exists() and not self.is_whole(operation, folder):
            yield "a file has the output's name and is not whole"

    def is_whole(self, operation: Operation, folder: Path) -> bool:
        """Whether the output is there, with the bytes of an undisturbed run."""
        return written(folder / operation.output) == self.references[operation.name]

    def left(self, operation: Operation, folder: Path) -> list[str]:
        """What lies in a run's folder beside the output."""
        return sorted(name for name in os.listdir(folder) if name != operation.output)


def ended(process: BaseProcess, log: Path, started: float, *, hangs: bool = False) -> Ended:
    """How a process ended that was started then."""
    process.join()
    code = process.exitcode or 0
    said = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    return Ended(_HANGS if hangs else code, _last(said), time.monotonic() - started)


def _last(said: str) -> str:
    return said.strip().rpartition("\n")[2]


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones too, by the digest of its content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def written(output: Path) -> dict[str, str]:
    """The files of an output, which is one or a folder of them; none where it is not there."""
    return {"": hashlib.sha256(output.read_bytes()).hexdigest()} if output.is_file() else digests(output)


def _options(command: str) -> frozenset[str]:
    from loratools.cli import cli

    found = cli.get_command(None, command)  # type: ignore[arg-type]
    return (
        frozenset(name for each in found.params for name in each.opts) if found is not None else frozenset()
    )
