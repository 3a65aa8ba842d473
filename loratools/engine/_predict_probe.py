"""How fast this machine and the storage in question are, from reading, writing and computing a little."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from loratools.engine import Plan, memory
from loratools.engine._predict_rates import Rates, Speed
from loratools.engine._predict_tasks import crowding, timed_tasks

Task = TypeVar("Task")
Result = TypeVar("Result")

_PROBED = 64 << 20  # bytes that are read, and written
_PIECE = 4 << 20  # bytes at a time
_LITTLE = 4 << 10  # bytes, whose way to the storage is all waiting
_LEAST = 1 << 20  # bytes, whose way to it tells how fast it is
_PLENTY = 1e12  # bytes per second: of what is not used, or takes no time that a clock can tell


def measure(
    plan: Plan[Task, Result],
    *,
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None,
    size: int = 0,
    planning: float = 0.0,
    within: float = 2.0,
    workers: int = 1,
) -> Rates:
    """Find out how fast a plan can be run here.

    Slices of the inputs are read, a file beside the output is written and removed, and tasks of each kind are run on
    one thread.

    Args:
        plan: What is to be done; its ``sample``, or its ``work`` where there is none, must write nothing that stays.
        inputs: Local files that it reads.
        output: What it writes, whose folder is there; None where it writes nothing.
        size: Bytes that are written beside what tasks write.
        planning: Seconds of what one run does once and has been done already.
        within: Seconds that running tasks may take, about; one of each kind is run even if it takes longer. Running
            one side by side takes half as long again.
        workers: How many tasks will run at a time; as many threads as there are processors are tried at most.

    Raises:
        OSError: An input cannot be read, or the output's folder cannot be written to.
    """
    read = _read_speed([os.fspath(path) for path in inputs], sum(item.read for item in plan.items))
    latency, write = _write_speed(output, size + sum(item.written for item in plan.items))
    started = time.perf_counter()
    import torch

    starting = time.perf_counter() - started  # nothing where it was imported before
    process = resident()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        operation, task, bandwidth = timed_tasks(plan, read.worker, within)
        read = Speed(bandwidth, max(bandwidth, read.together))
        found = Rates(read, write, operation, task, run=planning + starting + latency, process=process)
        count = min(workers, os.cpu_count() or 1)
        crowded = crowding(plan, found.alone, count, within / 2, memory.installed() // 2)
    finally:
        torch.set_num_threads(before)
    return found._replace(crowding=crowded)


def resident() -> int:
    """Bytes of memory that this process has held at most; 0 where nothing tells."""
    if sys.platform == "win32":
        return _windows()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _read_speed(paths: Sequence[str], needed: int) -> Speed:
    """Of one thread, and of as many as there are processors, each of which reads other places than the rest."""
    if not needed:
        return Speed(_PLENTY)
    sizes = {path: os.path.getsize(path) for path in dict.fromkeys(paths)}
    files = [path for path in sizes if sizes[path]]
    wanted = min(_PROBED, needed, sum(sizes.values()))
    if not wanted:
        return Speed(_PLENTY)
    threads = os.cpu_count() or 1
    share = max(_LITTLE, wanted // (1 + threads))
    one = _clocked(lambda: _read(_places(files, sizes, share, 0, 1 + threads)))
    with ThreadPoolExecutor(threads) as pool:
        turns = [_places(files, sizes, share, turn, 1 + threads) for turn in range(1, 1 + threads)]
        all_of_them = _clocked(lambda: list(pool.map(_read, turns)))
    alone = share / one
    return Speed(alone, max(alone, threads * share / all_of_them))


def _places(
    files: Sequence[str], sizes: dict[str, int], size: int, turn: int, turns: int
) -> list[tuple[str, int, int]]:
    """File, offset and length of pieces of ``size`` bytes in all, spread over the files; other ones in every turn."""
    pieces = max(1, min(size // _PIECE, 64))
    length = size // pieces
    found = []
    for number in range(pieces):
        path = files[number % len(files)]
        part = (number * turns + turn) / (pieces * turns)
        found.append((path, int(max(0, sizes[path] - length) * part), min(length, sizes[path])))
    return found


def _read(places: Sequence[tuple[str, int, int]]) -> None:
    buffer = bytearray(max(length for _, _, length in places))
    for path, start, length in places:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            file.readinto(memoryview(buffer)[:length])


def _write_speed(output: str | os.PathLike[str] | None, needed: int) -> tuple[float, Speed]:
    """Seconds that bringing next to nothing to the storage takes, and the speed beyond that."""
    if output is None or not needed:
        return 0.0, Speed(_PLENTY)
    folder = Path(os.path.realpath(output)).parent
    latency = sum(_written(folder, _LITTLE))
    size = max(_LEAST, min(_PROBED, needed))
    given, brought = _written(folder, size)
    storage = max(given, given + brought - latency)
    return latency, Speed(size / given, size / storage, behind=True)


def _written(folder: Path, size: int) -> tuple[float, float]:
    """Seconds in which the system takes so many bytes, and those in which it brings them to the storage."""
    data = memoryview(
        os.urandom(min(size, _PIECE))
    )  # storage that compresses would have it too easy with zeros
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        given = _clocked(lambda: [file.write(data[: size - at]) for at in range(0, size, _PIECE)])
        return given, _clocked(lambda: os.fsync(file.fileno()))


def _clocked(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return max(1e-9, time.perf_counter() - started)


def _windows() -> int:
    """What K32GetProcessMemoryInfo says (PROCESS_MEMORY_COUNTERS of the Windows API)."""
    if sys.platform != "win32":
        return 0
    import ctypes

    class Counters(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("faults", ctypes.c_uint32),
            ("peak", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 7),
        )

    counters = Counters(length=ctypes.sizeof(Counters))
    system = ctypes.windll.kernel32
    system.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(system.GetCurrentProcess())
    said = system.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.length)
    return int(counters.peak) if said else 0
