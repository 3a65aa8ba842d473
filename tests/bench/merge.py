"""A linear merge of two SDXL-shaped adapters to rank 32 against the dense route, in one run.

The dense route builds ΔW of every module and takes torch.linalg.svd of it. It is timed on one module of every
distinct shape and extrapolated by how many modules have that shape. The same sample compares the results.

Run: python -m tests.bench.merge
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import loratools
from loratools import Adapter, Target
from loratools.kinds import lora
from tests.bench._common import PYTHON, make, shapes

RANK = 32


def main() -> None:
    """Print time, memory and error."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = [make(folder / f"{seed}.safetensors", rank=RANK, seed=seed) for seed in (1, 2)]
        size = sum(path.stat().st_size for path in inputs)
        print(f"two SDXL-shaped adapters: 794 modules, rank {RANK}, float16, {size / 1e6:.0f} MB together")
        seconds = statistics.median(_timed(inputs, folder / f"merged{run}.safetensors") for run in range(3))
        peak = _peak(_command(inputs, folder / "peak.safetensors"))
        own = _peak([PYTHON, "-c", "import torch"])
        exact = folder / "float32.safetensors"
        subprocess.run([*_command(inputs, exact), "--dtype", "float32"], check=True)
        dense, error = _dense(inputs, exact)
        counts = Counter(shape for _, shape in shapes())
        print(f"merge --rank {RANK}, whole process, reading and writing included: {seconds:.2f} s")
        print(f"dense route, extrapolated from one module of each of {len(counts)} shapes: {dense:.0f} s")
        print(f"ratio {dense / seconds:.0f}")
        print(f"largest relative difference of ΔW (stored in float32) from the best in float64: {error:.1e}")
        print(f"peak memory {peak / 1e6:.0f} MB, of which import torch {own / 1e6:.0f} MB:")
        print(f"{(peak - own) / size:.2f} x the inputs beyond torch's own")


def _command(inputs: list[Path], output: Path) -> list[str]:
    paths = [str(path) for path in inputs]
    return [PYTHON, "-m", "loratools", "merge", *paths, "-o", str(output), "--rank", str(RANK), "--quiet"]


def _timed(inputs: list[Path], output: Path) -> float:
    start = time.perf_counter()
    subprocess.run(_command(inputs, output), check=True)
    return time.perf_counter() - start


def _peak(command: list[str]) -> float:
    """Largest resident size of a command in bytes, by a process that has no other children."""
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    found = subprocess.run([PYTHON, "-c", script, *command], check=True, capture_output=True, text=True)
    unit = 1 if sys.platform == "darwin" else 1024
    return float(found.stdout.split()[-1]) * unit


def _dense(inputs: list[Path], output: Path) -> tuple[float, float]:
    adapters = [loratools.load(path) for path in inputs]
    merged = loratools.load(output)
    counts = Counter(shape for _, shape in shapes())
    seconds, worst = 0.0, 0.0
    seen: set[tuple[int, ...]] = set()
    for target, module in merged.modules.items():
        shape = module.shape
        if shape is None or shape in seen:
            continue
        seen.add(shape)
        start = time.perf_counter()
        total = sum((adapter.modules[target].delta() for adapter in adapters), torch.zeros(shape))
        u, sigma, vh = torch.linalg.svd(total, full_matrices=False)
        (u[:, :RANK] * sigma[:RANK]) @ vh[:RANK]
        seconds += (time.perf_counter() - start) * counts[shape]
        found = lora.matrices(module)
        worst = max(worst, _difference(found[0] @ found[1] * module.scale, adapters, target))
    return seconds, worst


def _difference(found: torch.Tensor, adapters: list[Adapter], target: Target) -> float:
    """Relative difference from the best approximation in float64, computed densely."""
    total = torch.zeros_like(found)
    for adapter in adapters:
        up, down = lora.matrices(adapter.modules[target])
        total += adapter.modules[target].scale * (up @ down)
    u, sigma, vh = torch.linalg.svd(total, full_matrices=False)
    best = (u[:, :RANK] * sigma[:RANK]) @ vh[:RANK]
    return float((found - best).norm() / best.norm())


if __name__ == "__main__":
    main()
