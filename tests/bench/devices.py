"""Seconds per SDXL-shaped module on the CPU and on a GPU, per method.

Run: python -m tests.bench.devices
"""

from __future__ import annotations

import time

import torch

from loratools import methods
from loratools.engine import local
from loratools.maths.lowrank import Factors

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


def main() -> None:
    """Print a line per method and shape."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print(f"torch {torch.__version__}, {local.default_threads()} processors, devices {', '.join(devices)}")
    for name, options in CASES:
        for shape in SHAPES:
            found = {device: seconds(name, options, shape, device) for device in devices}
            said = ", ".join(f"{device} {value * 1000:.1f} ms" for device, value in found.items())
            ratio = f", cpu / cuda {found['cpu'] / found['cuda']:.2f}" if "cuda" in found else ""
            print(f"{name} {shape[0]} x {shape[1]}: {said}{ratio}")


if __name__ == "__main__":
    main()
