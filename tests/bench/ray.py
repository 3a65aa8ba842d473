"""Bake and extract with Ray and two workers against this machine's threads, one of them and two, taken in turn.

Whole processes are timed, and the operation inside of them: what the report calls ``seconds``. Ray's start-up is timed
by itself: a process that starts a Ray of two workers, lets it do nothing and ends it, less one that imports torch. On a
cluster it is paid once, by whoever starts the cluster. Memory is that of all processes of a run together (Linux).

Run: python -m tests.bench.ray [--rounds N] [--layers N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from tests.bench._common import PYTHON
from tests.bench._processes import Ran, commands, watched
from tests.bench.bake import remove

_START = """
import torch
from loratools.engine import Item, Plan
from loratools.engine.ray import Ray
with Ray(workers=2) as engine:
    list(engine.run(Plan(abs, [1, 2], [Item("a"), Item("b")])))
"""
_WAYS = {
    "threads 1": ("--threads", "1"),
    "threads 2": ("--threads", "2"),
    "ray 2": ("--engine", "ray", "--workers", "2"),
}


def start_up(rounds: int) -> float:
    """Print and return what starting and ending a Ray takes, in seconds."""
    with_ray = [watched([PYTHON, "-c", _START]) for _ in range(rounds)]
    without = [watched([PYTHON, "-c", "import torch"]) for _ in range(rounds)]
    found = _middle(with_ray) - _middle(without)
    print(
        f"Ray starts two workers, does nothing and ends: {_middle(with_ray):.1f} s, of which torch's import"
        f" {_middle(without):.1f} s; {max(ran.peak for ran in with_ray) / 2**20:.0f} MiB in all"
    )
    return found


def _middle(runs: list[Ran]) -> float:
    return statistics.median(ran.seconds for ran in runs)


def compare(name: str, arguments: tuple[str, ...], output: Path, rounds: int, start: float) -> None:
    """Print times, ratios and memory of one command in every way."""
    found: dict[str, list[Ran]] = {way: [] for way in _WAYS}
    for number in range(rounds + 1):
        for way, options in _WAYS.items():
            ran = watched([*arguments, *options])
            remove(output)
            if number:  # the first warms the cache
                found[way].append(ran)
    for way, runs in found.items():
        inside = statistics.median(ran.report["seconds"] for ran in runs)
        print(
            f"{name}, {way}: {_middle(runs):.1f} s, {inside:.1f} s inside;"
            f" {max(ran.peak for ran in runs) / 2**20:.0f} MiB,"
            f" {max(ran.largest for ran in runs) / 2**20:.0f} MiB in one process"
        )
    for way in ("threads 1", "threads 2"):
        pairs = list(zip(found["ray 2"], found[way], strict=True))
        whole = statistics.median(ray.seconds / other.seconds for ray, other in pairs)
        inside = statistics.median((ray.seconds - start) / other.seconds for ray, other in pairs)
        print(f"{name}, ray 2 to {way}: {whole:.2f}; without Ray's start-up {inside:.2f}")


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16, help="of the model: 16 make 2.5 GB")
    asked = parser.parse_args()
    start = start_up(asked.rounds)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        for what, arguments, output in commands(Path(name), asked.layers).each():
            compare(what, arguments, output, asked.rounds, start)


if __name__ == "__main__":
    main()
