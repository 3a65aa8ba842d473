"""Resizing an SDXL-shaped rank-64 adapter to rank 16, against copying it, and against a full SVD of every ΔW.

The first ratio is of whole processes, taken in turn: `loratools resize`, and one that starts Python, imports
safetensors.torch, reads every tensor of the file and writes them again. The limit is 3. For the second, ΔW of one
module of every distinct shape is built in float32 and decomposed by torch.linalg.svd, and its seconds are multiplied by
how many modules have that shape; at least 200 is asked for. The same sample says how far the result is from the best.

Run: python -m tests.bench.resize [--runs N] [--rank 16] [--from-rank 64]
"""

from __future__ import annotations

import argparse
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
        ratio = compare("resize against reading and writing", ours, copy, asked.runs)
        print(f"limit {LIMIT}: {'kept' if ratio <= LIMIT else 'missed'}")
        seconds = timed(ours)
        dense, error = _dense(source, folder / "small.safetensors", asked.rank)
    counts = Counter(shape for _, shape in shapes())
    print(f"full SVD, extrapolated from one module of each of {len(counts)} shapes: {dense:.0f} s")
    met = "met" if dense / seconds >= LEAST else "missed"
    print(f"ratio {dense / seconds:.0f}, at least {LEAST:.0f} asked for: {met}")
    print(f"largest relative difference of ΔW, stored in float16, from the best of its rank: {error:.1e}")


def _dense(source: Path, resized: Path, rank: int) -> tuple[float, float]:
    """Seconds of the dense route for all modules, and how far the sampled results are from its own."""
    before, after = loratools.load(source), loratools.load(resized)
    counts = Counter(shape for _, shape in shapes())
    seconds, worst = 0.0, 0.0
    seen: set[tuple[int, ...]] = set()
    for target, module in before.modules.items():
        shape = module.shape
        if shape is None or shape in seen:
            continue
        seen.add(shape)
        start = time.perf_counter()
        u, sigma, vh = torch.linalg.svd(module.delta(), full_matrices=False)
        best = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
        once = time.perf_counter() - start
        seconds += once * counts[shape]
        print(f"  {counts[shape]:4d} of {shape[0]:6d} x {shape[1]:<6d} {1000 * once:10.1f} ms", flush=True)
        up, down = lora.matrices(after.modules[target])
        found = after.modules[target].scale * (up @ down)
        worst = max(worst, float((found - best).norm() / best.norm()))
    return seconds, worst


if __name__ == "__main__":
    main()
