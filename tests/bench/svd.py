"""Milliseconds of a decomposition at rank 32: torch.linalg.svd against the ways that extraction has.

Run: python -m tests.bench.svd [--device cuda] [--threads 1] [--rank 32] [--quick]

Matrices are heavy-tailed (Student's t, 2.5 degrees of freedom), low rank plus noise, or white noise. The last column is
the worst error of the three ways against the optimum, less one. The full decomposition of the largest shapes takes
minutes; --quick leaves them out. Totals weigh each shape with how often it occurs in Stable Diffusion 1.5's UNet.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from loratools.maths.rank import Rule
from loratools.maths.svd import decompose, decompose_batch

# (out, in) and how many linear layers of SD1.5's UNet have it; 0: of Llama-shaped models.
SHAPES = {
    (320, 320): 40,
    (320, 768): 10,
    (2560, 320): 5,
    (320, 1280): 5,
    (640, 640): 40,
    (640, 768): 10,
    (5120, 640): 5,
    (640, 2560): 5,
    (1280, 1280): 48,
    (1280, 768): 12,
    (10240, 1280): 6,
    (1280, 5120): 6,
    (2048, 2048): 0,
    (4096, 4096): 0,
    (4096, 11008): 0,
}
LARGE = 4096


def matrices(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """One matrix of each sort."""
    torch.manual_seed(0)
    low = torch.randn(shape[0], 16) @ torch.randn(16, shape[1])
    return {
        "tails": torch.distributions.StudentT(2.5).sample(shape),
        "low+noise": low + 0.1 * torch.randn(shape),
        "white": torch.randn(shape),
    }


def timed(work: Callable[[], Any], device: str, runs: int) -> tuple[float, Any]:
    """The least milliseconds of several runs, and the last result."""
    times = []
    for _ in range(runs):
        _wait(device)
        start = time.perf_counter()
        result = work()
        _wait(device)
        times.append(1000 * (time.perf_counter() - start))
    return min(times), result


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def row(name: str, matrix: torch.Tensor, rank: int, device: str) -> tuple[float, float]:
    """Print one matrix's figures; milliseconds of the full decomposition and of ``auto``."""
    rule = Rule("rank", rank)
    timed(lambda: torch.linalg.svd(matrix[:64, :64]), device, 1)
    ways = {}
    for way in ("exact", "randomized", "auto"):
        ways[way] = timed(lambda way=way: decompose(matrix, rule, method=way), device, 3)
    full, found = timed(lambda: torch.linalg.svd(matrix, full_matrices=False), device, 1)
    optimum = float(found[1][rank:].double().square().sum())
    worst = max((one.lost / optimum) ** 0.5 - 1 for _, one in ways.values())
    said = " ".join(f"{ways[way][0]:9.1f}" for way in ways)
    batched = ""
    if device == "cuda":
        stack = matrix.expand(8, -1, -1).contiguous()
        batched = f" {timed(lambda: decompose_batch(stack, rule), device, 3)[0] / 8:9.1f} batched"
    auto = ways["auto"][0]
    print(
        f"{matrix.shape[0]:5d} x {matrix.shape[1]:<5d} {name:9s} {full:9.1f} {said}{batched}"
        f" {full / auto:7.1f} x {worst:9.1e}",
        flush=True,
    )
    return full, auto


def main() -> None:
    """Print a line per shape and sort of matrix, and the totals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, rank {options.rank}")
    print("out x in      matrix         svd     exact    random      auto    ratio      excess")
    totals: dict[str, list[float]] = {}
    for shape, count in SHAPES.items():
        if options.quick and min(shape) >= LARGE:
            continue
        for name, matrix in matrices(shape).items():
            full, auto = row(name, matrix.to(options.device), options.rank, options.device)
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += count * full
            total[1] += count * auto
    for name, (full, auto) in totals.items():
        print(f"SD1.5 UNet, {name}: {full / 1000:.1f} s against {auto / 1000:.1f} s, {full / auto:.1f} x")


if __name__ == "__main__":
    main()
