"""Fuzz the readers with hostile bytes, and print what was run, how long, and what was found.

Run: python -m tests.fuzz [TARGET…] [--runs N] [--seconds S] [--corpus FOLDER] [--seed N]

Guided by coverage where atheris is installed, one process for each target; else hypothesis chooses seeds and changes.
Exit status 1: something was found; the inputs are in the corpus folder.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.chosen import campaign
from tests.fuzz.targets import TARGETS

_LONGEST = 1 << 16  # bytes of an input
_HANG = 60  # seconds after which libFuzzer ends the process
_PROGRESS = re.compile(r"^#\d+\s+\w+\s+cov: (\d+) ft: (\d+)", re.MULTILINE)
_UNITS = re.compile(r"^stat::number_of_executed_units:\s*(\d+)", re.MULTILINE)


class Row(NamedTuple):
    """What became of one target: executions, seconds, edges and features of libFuzzer's (0 without), findings."""

    target: str
    runs: int
    seconds: float
    edges: int
    features: int
    findings: int


def main() -> int:
    """Run the targets one after another."""
    asked = _options()
    rows = []
    print(
        "| target | executions | seconds | edges | features | findings |\n| --- | --: | --: | --: | --: | --: |"
    )
    for name in asked.targets or TARGETS:
        folder = asked.corpus / name
        folder.mkdir(parents=True, exist_ok=True)
        before = _found(folder)
        row = _guided(name, asked) if find_spec("atheris") else _chosen(name, asked)
        rows.append(row._replace(findings=row.findings + _found(folder) - before))
        print(_line(rows[-1]), flush=True)
    print(_line(_total(rows)))
    return int(any(row.findings for row in rows))


def _found(folder: Path) -> int:
    return len(list(folder.glob("finding-*.bin")))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--runs", type=int, default=60_000, help="executions of each target (60000)")
    parser.add_argument("--seconds", type=int, default=600, help="most seconds of each target (600)")
    parser.add_argument("--seed", type=int, default=1, help="of the random choices (1)")
    default = Path(tempfile.gettempdir()) / "loratools-fuzz"
    parser.add_argument("--corpus", type=Path, default=default, help=f"where inputs are kept ({default})")
    asked = parser.parse_args()
    unknown = [name for name in asked.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target {unknown[0]!r}; there are {', '.join(TARGETS)}")
    return asked


def _guided(name: str, asked: argparse.Namespace) -> Row:
    """One target in a process of its own, since libFuzzer ends it."""
    folder = asked.corpus / name
    for number, seed in enumerate(TARGETS[name].seeds()):
        (folder / f"seed-{number}").write_bytes(seed)
    flags = [f"-runs={asked.runs}", f"-max_total_time={asked.seconds}", f"-seed={asked.seed}"]
    flags += [f"-max_len={_LONGEST}", f"-timeout={_HANG}", "-rss_limit_mb=0", "-print_final_stats=1"]
    flags += [f"-artifact_prefix={folder}{os.sep}finding-", str(folder)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=_scratch()) as scratch:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.guided", name, str(asked.corpus), scratch, *flags],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    seconds = time.monotonic() - start
    units, told = _UNITS.search(done.stderr), _PROGRESS.findall(done.stderr)
    if done.returncode or units is None or not told:
        (folder / "died.log").write_text(done.stderr, "utf-8")
        print(f"{name}: ended with status {done.returncode}; see {folder / 'died.log'}", file=sys.stderr)
    edges, features = map(int, told[-1]) if told else (0, 0)
    # A process that ends of itself was ended by an input; what it had run is in its last line of progress.
    died = int(done.returncode != 0)
    return Row(name, int(units[1]) if units else _last_run(done.stderr), seconds, edges, features, died)


def _last_run(told: str) -> int:
    counts = re.findall(r"^#(\d+)", told, re.MULTILINE)
    return int(counts[-1]) if counts else 0


def _chosen(name: str, asked: argparse.Namespace) -> Row:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=_scratch()) as scratch:
        runs = campaign(name, Path(scratch), asked.corpus / name, asked.runs, asked.seconds, asked.seed)
    return Row(name, runs, time.monotonic() - start, 0, 0, 0)


def _scratch() -> str | None:
    """A folder in memory, where there is one: an input is a file for a moment."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _total(rows: list[Row]) -> Row:
    runs, seconds = sum(row.runs for row in rows), sum(row.seconds for row in rows)
    return Row("all", runs, seconds, 0, 0, sum(row.findings for row in rows))


def _line(row: Row) -> str:
    guided = f"{row.edges:,} | {row.features:,}" if row.edges else " | "
    return f"| {row.target} | {row.runs:,} | {row.seconds:,.0f} | {guided} | {row.findings} |"


if __name__ == "__main__":
    sys.exit(main())
