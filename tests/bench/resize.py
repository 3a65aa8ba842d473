"""Resizing an SDXL-shaped rank-64 adapter to rank 16, against copying it, and against a dense SVD of every ΔW.

The first ratio is of whole processes, taken in turn: `loratools resize`, and one that starts Python, imports
safetensors.torch, reads every tensor of the file and writes them again. The limit is 3.

The others are extrapolated: ΔW of the first module of every distinct shape is built in float32 and decomposed by
torch.linalg.svd, and its seconds are multiplied by how many modules have that shape. Nothing else of that route
(reading, forming ΔW, writing) is counted. Two calls are measured:

- full: torch.linalg.svd(ΔW), whose default is full_matrices=True, so that U is (out, out) and V (in, in). This is what
  sd-scripts' and LyCORIS' resizing scripts call; at least 200 times our time is asked for.
- thin: torch.linalg.svd(ΔW, full_matrices=False), the least that a dense route can do.

Our time is the median of the same runs as in the first ratio, as it is, and without the start of Python and torch,
which neither dense route is charged with. The thin decomposition also says how far the written file is from the best.

Run: python -m tests.bench.resize [--runs N] [--rank 16] [--from-rank 64]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import loratools
from loratools.kinds import lora
from tests.bench._common import LORATOOLS, PYTHON, compare, make, shapes, timed

_COPY = "import sys; from safetensors.torch import load_file, save_file; save_file(load_file(sys.argv[1]), sys.argv[2])"
LIMIT, LEAST = 3.0, 200.0


def main() -> None:
    """Print both ratios and the largest error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--from-rank", type=int, default=64)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make(folder / "adapter.safetensors", rank=asked.from_rank)
        size = source.stat().st_size / 1e6
        print(
            f"SDXL-shaped: 794 modules, rank {asked.from_rank}, float16, {size:.0f} MB, to rank {asked.rank}"
        )
        ours = [LORATOOLS, "resize", str(source), "-o", str(folder / "small.safetensors")]
        ours += ["--rank", str(asked.rank), "--quiet", "--overwrite"]
        copy = [PYTHON, "-c", _COPY, str(source), str(folder / "copy.safetensors")]
        pairs = compare("resize against reading and writing", ours, copy, asked.runs)
        print(f"limit {LIMIT}: {'kept' if pairs.ratio <= LIMIT else 'missed'}")
        start = statistics.median(timed([PYTHON, "-c", "import torch"]) for _ in range(asked.runs))
        full, thin, error = _dense(source, folder / "small.safetensors", asked.rank)
    count = len({shape for _, shape in shapes()})
    print(f"dense SVD of every ΔW, extrapolated from one module of each of {count} shapes:")
    net = pairs.mine - start
    for name, seconds in (("thin, full_matrices=False", thin), ("full, torch's default", full)):
        print(
            f"  {name}: {seconds:.0f} s, {seconds / net:.0f} times ours without the {start:.2f} s that Python and "
            f"torch take to start, {seconds / pairs.mine:.0f} times the whole process"
        )
    met = "met" if full / net >= LEAST else "missed"
    print(f"at least {LEAST:.0f} asked for of the full one: {met}")
    print(f"largest relative difference of ΔW, stored in float16, from the best of its rank: {error:.1e}")


def _dense(source: Path, resized: Path, rank: int) -> tuple[float, float, float]:
    """Seconds of the full and the thin dense route for all modules, and how far the results are from the best."""
    before, after = loratools.load(source), loratools.load(resized)
    counts = Counter(shape for _, shape in shapes())
    sample = {module.shape: target for target, module in reversed([*before.modules.items()])}
    whole, lean, worst = 0.0, 0.0, 0.0
    for shape, target in sample.items():
        assert shape is not None
        delta = before.modules[target].delta()
        full, _ = _decomposed(delta, full=True)
        thin, (u, sigma, vh) = _decomposed(delta, full=False)
        whole += full * counts[shape]
        lean += thin * counts[shape]
        print(
            f"  {counts[shape]:4d} of {shape[0]:6d} x {shape[1]:<6d} {full:8.2f} s full {thin:8.2f} s thin",
            flush=True,
        )
        up, down = lora.matrices(after.modules[target])
        best = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
        found = after.modules[target].scale * (up @ down)
        worst = max(worst, float((found - best).norm() / best.norm()))
    return whole, lean, worst


def _decomposed(delta: torch.Tensor, *, full: bool) -> tuple[float, tuple[torch.Tensor, ...]]:
    start = time.perf_counter()
    found = torch.linalg.svd(delta, full_matrices=full)
    return time.perf_counter() - start, tuple(found)


if __name__ == "__main__":
    main()
