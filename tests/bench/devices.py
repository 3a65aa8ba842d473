"""The CPU against a GPU: whole resizes and merges of SDXL-shaped adapters, and single modules per method.

The adapters have 794 modules in float16. A resize goes from rank 64 to 16 and by a share of energy, which needs all
directions; a merge takes two. Inputs are read into memory beforehand, and every operation is run once before it is
timed, so that seconds are of computing, of transfers and of rounding to the store dtype; the median of the runs. The
difference is that of ΔW as it is stored, the largest of all modules. Without a GPU the CPU's seconds are printed alone.

Run: python -m tests.bench.devices [--runs N] [--rank 64]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import loratools
from loratools import methods
from loratools.engine import local
from loratools.kinds import lora
from loratools.maths.lowrank import Factors
from loratools.model import Adapter
from loratools.ops.merge import merge
from loratools.ops.resize import resize
from tests.bench._common import make

Operation = Callable[[str], tuple[Adapter, Any]]

SHAPES = ((1280, 1280), (10240, 1280), (1280, 5120), (640, 2048))
CASES = (("linear", {"rank": 32}), ("ties", {"rank": 64, "density": 0.2}))


def parts(shape: tuple[int, int], device: str) -> list[methods.Part]:
    """Two rank-32 adapters of one weight."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2):
        up = torch.randn(shape[0], 32, generator=generator, dtype=torch.float64) / shape[0] ** 0.5
        down = torch.randn(32, shape[1], generator=generator, dtype=torch.float64) / shape[1] ** 0.5
        found.append(methods.Part(Factors(up.to(device), down.to(device)), 0.5))
    return found


def seconds(
    name: str, options: dict[str, float], shape: tuple[int, int], device: str, runs: int = 16
) -> float:
    """Mean seconds per module, several modules side by side as a merge has them."""
    method, settings = methods.methods()[name], methods.Options(**options)

    def work(given: list[methods.Part]) -> None:
        method.combine(given, settings)
        if device == "cuda":
            torch.cuda.synchronize()

    inputs = [parts(shape, device) for _ in range(2)]
    list(local.run(work, inputs))
    start = time.perf_counter()
    list(local.run(work, (inputs[number % 2] for number in range(runs))))
    return (time.perf_counter() - start) / runs


def operations(folder: Path, rank: int) -> dict[str, Operation]:
    """What is timed, by name."""
    one, two = (loratools.load(make(folder / f"{seed}.safetensors", rank=rank, seed=seed)) for seed in (0, 1))
    few = max(1, rank // 4)
    return {
        f"resize {rank} to {few}": lambda device: resize(one, rank=few, device=device),
        "resize to 90 % of energy": lambda device: resize(one, energy=0.9, device=device),
        f"merge linear to {few}": lambda device: merge([one, two], rank=few, device=device),
        "merge linear, whole": lambda device: merge([one, two], device=device),
        "merge svd": lambda device: merge([one, two], method="svd", device=device),
    }


def taken(operation: Operation, device: str, runs: int) -> tuple[float, Adapter]:
    """The median of seconds, and the result."""
    result, _ = operation(device)
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        operation(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def apart(one: Adapter, other: Adapter) -> float:
    """The largest relative difference of ΔW of a module, from factors: ‖A − B‖² is a sum of small Gram products."""
    worst = 0.0
    for target, module in one.modules.items():
        (up, down), (left, right) = lora.matrices(module), lora.matrices(other.modules[target])
        ups = torch.cat([module.scale * up, -other.modules[target].scale * left], dim=1)
        downs = torch.cat([down, right])
        square = float(((ups.T @ ups) * (downs @ downs.T)).sum())
        whole = float(module.scale**2 * ((up.T @ up) * (down @ down.T)).sum())
        worst = max(worst, (max(0.0, square) / whole) ** 0.5)
    return worst


def whole(devices: list[str], rank: int, runs: int) -> None:
    """Print a line per operation."""
    with tempfile.TemporaryDirectory() as name:
        for title, operation in operations(Path(name), rank).items():
            found = {device: taken(operation, device, runs) for device in devices}
            said = ", ".join(f"{device} {seconds:.2f} s" for device, (seconds, _) in found.items())
            if "cuda" in found:
                (cpu, here), (cuda, there) = found["cpu"], found["cuda"]
                said += f", cpu / cuda {cpu / cuda:.2f}, ΔW apart by {apart(here, there):.1e}"
            print(f"{title}: {said}", flush=True)


def single(devices: list[str]) -> None:
    """Print a line per method and shape."""
    for name, options in CASES:
        for shape in SHAPES:
            found = {device: seconds(name, options, shape, device) for device in devices}
            said = ", ".join(f"{device} {value * 1000:.1f} ms" for device, value in found.items())
            ratio = f", cpu / cuda {found['cpu'] / found['cuda']:.2f}" if "cuda" in found else ""
            print(f"{name} {shape[0]} x {shape[1]}: {said}{ratio}", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rank", type=int, default=64)
    asked = parser.parse_args()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print(f"torch {torch.__version__}, {local.default_threads()} processors, devices {', '.join(devices)}")
    whole(devices, asked.rank, asked.runs)
    single(devices)


if __name__ == "__main__":
    main()
