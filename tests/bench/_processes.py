"""Processes that are timed with all that they start, and the memory of all of them together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench._checkpoints import CHANGE, Shapes, llama, llama_adapter, write_sharded
from tests.bench._common import LORATOOLS

_LOOK = 0.05  # seconds between two looks at the memory, and by how much times are rounded up


class Ran(NamedTuple):
    """A command that ended.

    Attributes:
        seconds: From start to end.
        peak: Bytes that it and all processes under it held at most together, shared memory counted once; 0 where the
            system does not tell (it does on Linux).
        largest: Of the one of them that held most.
        own: What the command's own process had resident at most, shared memory included, in bytes.
        report: What it wrote to stdout, read as JSON; None where that is empty.
    """

    seconds: float
    peak: int
    largest: int
    own: int
    report: Any


def watched(command: Sequence[str], **environment: str) -> Ran:
    """Run a command to its end, and look at its memory meanwhile.

    Raises:
        SystemExit: It failed.
    """
    peak = largest = 0
    with tempfile.TemporaryFile() as stdout:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout, env={**os.environ, **environment})
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            sizes = [_held(each) for each in _family(process.pid)]
            peak, largest = max(peak, sum(sizes)), max(largest, *sizes)
            time.sleep(_LOOK)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        own = ended[2].ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        stdout.seek(0)
        said = stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return Ran(seconds, peak, largest, own, json.loads(said) if said.strip() else None)


def _family(root: int) -> list[int]:
    """A process and all under it."""
    if not sys.platform.startswith("linux"):
        return [root]
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                after_name = (entry / "stat").read_text("ascii", "replace").rpartition(")")[2].split()
                children.setdefault(int(after_name[1]), []).append(int(entry.name))
    found = [root]
    for parent in found:
        found.extend(children.get(parent, ()))
    return found


def _held(process: int) -> int:
    """Bytes that a process holds, its share of what it shares; 0 for one that has ended."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


class Commands(NamedTuple):
    """The commands of a bench, on a model of about 2.5 GB; options go behind them.

    Attributes:
        bake: Arguments of a bake.
        extract: Arguments of an extraction.
        outputs: Where each writes.
    """

    bake: tuple[str, ...]
    extract: tuple[str, ...]
    outputs: tuple[Path, Path]

    def each(self) -> list[tuple[str, tuple[str, ...], Path]]:
        """Name, arguments and output of each."""
        return [("bake", self.bake, self.outputs[0]), ("extract", self.extract, self.outputs[1])]


def commands(folder: Path, layers: int = 16, rank: int = 32) -> Commands:
    """Make a sharded Llama-shaped model, a tuned one and an adapter, and say what is done with them.

    Args:
        folder: Where they are made.
        layers: Of the model, a count: 16 make 2.5 GB.
        rank: Of the adapter that is baked, and of that which is extracted.
    """
    shapes: Shapes = llama(layers)
    base = write_sharded(folder / "base", shapes)
    tuned = write_sharded(folder / "tuned", shapes, change=CHANGE)
    adapter = llama_adapter(folder / "adapter", layers, rank)
    baked, extracted = folder / "baked", folder / "extracted"
    return Commands(
        (LORATOOLS, "bake", str(base), str(adapter), "-o", str(baked), "--json", "--quiet"),
        (
            *(LORATOOLS, "extract", str(base), str(tuned), "--rank", str(rank), "--svd", "randomized"),
            *("-o", str(extracted), "--json", "--quiet"),
        ),
        (baked, extracted),
    )
