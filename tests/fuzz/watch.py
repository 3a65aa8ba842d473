"""One execution, watched: what may come of hostile bytes is a value or a LoraError, soon and in little memory."""

from __future__ import annotations

import hashlib
import time
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from loratools.errors import LoraError
from tests.fuzz.targets import Run

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows: memory is not watched there
    resource = None

SECONDS = 5.0
"""Of processor time for one input of a few thousand bytes."""
GROWTH = 256 << 20
"""Bytes by which one input may raise the most memory that the process ever had."""
_ADDRESSES = 4 << 30  # bytes of addresses beyond those in use at the start: torch and atheris reserve some


class Finding(NamedTuple):
    """What should not have come of an input.

    Attributes:
        what: The exception's type, "slow", or "memory".
        where: The innermost line of loratools, or empty.
        told: The whole traceback, or the measure.
    """

    what: str
    where: str
    told: str


def watched(run: Run, data: bytes) -> Finding | None:
    """Run it, and say what should not have come of it."""
    before, start = _peak(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(data)
    except LoraError:
        pass
    except Exception as error:
        return Finding(type(error).__name__, _place(error), traceback.format_exc())
    taken, grown = time.process_time() - start, _peak() - before
    if taken > SECONDS:
        return Finding("slow", "", f"{taken:.1f} s")
    if grown > GROWTH:
        return Finding("memory", "", f"{grown:,} bytes")
    return None


def limit_memory() -> None:
    """Turn what would take more memory than anything here should into a MemoryError."""
    if resource is None:
        return
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # only Linux tells how much a process has reserved, and keeps to such limits
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESSES, resource.RLIM_INFINITY))


class Kept:
    """Findings in a folder, one input of each kind."""

    def __init__(self, folder: Path) -> None:
        """The folder is made when there is something to keep."""
        self.folder = folder
        self._seen: set[tuple[str, str]] = set()

    def add(self, found: Finding, data: bytes) -> bool:
        """Keep the input and what came of it, unless there was one of its kind already."""
        if found[:2] in self._seen:
            return False
        self._seen.add(found[:2])
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"finding-{hashlib.sha256(data).hexdigest()[:12]}"
        (self.folder / f"{name}.bin").write_bytes(data)
        (self.folder / f"{name}.txt").write_text(f"{found.what} {found.where}\n{found.told}\n", "utf-8")
        return True


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "loratools" in Path(frame.filename).parts]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def _peak() -> int:
    """The most memory that the process ever had, in bytes, as far as the system tells."""
    if resource is None:
        return 0
    # Linux counts in KiB, macOS in bytes; taking the latter for the former would only be too strict.
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
