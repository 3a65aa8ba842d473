"""Extraction at rank 32 against torch.linalg.svd of every layer, as whole processes, and the memory it takes.

The full decomposition (float32, torch's own threads) is timed on a sample of the layers that are extracted, --sample
of each shape, and multiplied by how many there are: as thin factors, and with --full as torch.linalg.svd gives them
unless told otherwise, square on both sides, which is how many tools call it. With --quick, shapes of more than 2
million values are taken at the highest rate of those measured, in out · in · min(out, in) per second (--full: in
max(out, in) for the smaller side, too): a lower bound. On a busy machine --threads 1
and the ratio of processor time, which is then printed, say more than wall time. From an extraction nothing is
subtracted: it includes the start of Python and torch, reading both checkpoints, and writing. Memory is the most that
the process had resident, beyond that of one that imports torch.

Run: python -m tests.bench.extract [--only sd15|llama] [--twice] [--quick] [--sample N] [--full]
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests.bench._checkpoints import CHANGE, changed, llama, sd15, write, write_sharded
from tests.bench._common import LORATOOLS, PYTHON
from tests.bench.bake import measured, remove

_TORCH = [PYTHON, "-c", "import torch"]
_QUICK = 2_000_000
Shape = tuple[int, int]


def extracted(shapes: dict[str, tuple[int, ...]]) -> Counter[Shape]:
    """How many matrices of each shape differ, kernels flattened."""
    found: Counter[Shape] = Counter()
    for name, shape in shapes.items():
        if changed(name, shape) and "embed" not in name:
            found[shape[0], math.prod(shape[1:])] += 1
    return found


def full_decomposition(counts: Counter[Shape], asked: argparse.Namespace) -> float:
    """Print seconds per shape, and return those of all layers; processor time where torch has one thread."""
    total, least = 0.0, math.inf
    most = _QUICK if asked.quick else math.inf
    side = max if asked.full else min
    work = {shape: float(shape[0]) * shape[1] * side(shape) for shape in counts}
    for shape in sorted(counts, key=lambda each: work[each]):
        if shape[0] * shape[1] <= most:
            seconds = _timed(shape, min(asked.sample, counts[shape]), full=asked.full)
            least = min(least, seconds / work[shape])
            said = ""
        else:
            seconds, said = least * work[shape], " (at least, by rate)"
        total += counts[shape] * seconds
        print(
            f"  {counts[shape]:4d} of {shape[0]:6d} x {shape[1]:<6d} {1000 * seconds:10.1f} ms{said}",
            flush=True,
        )
    return total


def _timed(shape: Shape, sample: int, *, full: bool) -> float:
    """Seconds of one full decomposition, the mean of a sample."""
    spent = 0.0
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for number in range(sample):
        matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(number))
        started = clock()
        torch.linalg.svd(matrix, full_matrices=full)
        spent += clock() - started
    return spent / sample


def extraction(what: str, base: Path, tuned: Path) -> float:
    """Print the seconds and memory of an extraction; its seconds, of the clock that the full decomposition has."""
    output = base.with_name("extracted" + base.suffix)
    start = measured(_TORCH)
    before = _spent()
    found = measured(
        [LORATOOLS, "extract", str(base), str(tuned), "--rank", "32", "-o", str(output), "--quiet"]
    )
    spent = _spent() - before
    beyond = (found.peak - start.peak) / 2**20
    print(
        f"{what}: {found.seconds:.1f} s ({start.seconds:.1f} s of it torch's start; {spent:.1f} s of processors),"
        f" {beyond:.0f} MiB beyond torch's"
    )
    remove(output)
    return spent if torch.get_num_threads() == 1 else found.seconds


def _spent() -> float:
    """Processor time of all processes that were waited for, seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def compare(
    what: str, pair: tuple[Path, Path], shapes: dict[str, tuple[int, ...]], asked: argparse.Namespace
) -> None:
    """Print the times of both ways, and their ratio."""
    seconds = extraction(what, *pair)
    if asked.memory:
        return
    full = full_decomposition(extracted(shapes), asked)
    print(
        f"{what}: torch.linalg.svd {full:.0f} s, extract {seconds:.1f} s, ratio {full / seconds:.1f}",
        flush=True,
    )


def options() -> argparse.Namespace:
    """What is asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("sd15", "llama"))
    parser.add_argument("--twice", action="store_true", help="a Llama of twice the size too, for its memory")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", action="store_true", help="leave out the full decompositions")
    parser.add_argument("--sample", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="square factors, torch.linalg.svd's default")
    parser.add_argument("--threads", type=int, help="of the full decomposition; default: torch's own")
    return parser.parse_args()


def main() -> None:
    """Print times, ratios and memory."""
    asked = options()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        if asked.only != "llama":
            shapes = sd15()
            pair = (
                write(folder / "base.safetensors", shapes),
                write(folder / "tuned.safetensors", shapes, change=CHANGE),
            )
            compare("SD1.5, float16", pair, shapes, asked)
            for path in pair:
                remove(path)
        if asked.only == "sd15":
            return
        for layers in (16, 32) if asked.twice else (16,):
            shapes = llama(layers)
            pair = (
                write_sharded(folder / "base", shapes),
                write_sharded(folder / "tuned", shapes, change=CHANGE),
            )
            compare(f"Llama of {layers} layers, bfloat16", pair, shapes, asked)
            for path in pair:
                remove(path)


if __name__ == "__main__":
    main()
