"""Comparing 10, 50 and 200 adapters, against reading the same files, and what the matrix takes in memory.

The adapters have the modules of six of SDXL's transformer blocks: 60 modules, rank 16, float16. Every comparison is a
process of its own on one thread. Seconds are CPU time of the comparison without the start of Python; those of reading
are of loading every tensor of the same files and adding it up in float64, which touches all that a comparison has to
widen. Memory is the most anonymous memory at any time beyond what importing torch and loratools took: the pages of
mapped files are the system's to drop. Up to 16 adapters are compared by spaces and signs too, more of them by inner
products alone.

Run: python -m tests.bench.compare [--counts 10 50 200] [--rank 16]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.bench._common import PYTHON, make, shapes

_PREFIX = "lora_unet_middle_block_1_transformer_blocks_"
_BLOCKS = tuple(f"{_PREFIX}{layer}_" for layer in range(6))
_INTERVAL = 0.005  # seconds between two looks at the memory


def main() -> None:
    """Print the table, or what one comparison took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--one", nargs="+", metavar="PATH", help="the inputs of a single comparison")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(_one(asked.one)))
        return
    with tempfile.TemporaryDirectory() as name:
        _table(Path(name), asked)


def _table(folder: Path, asked: argparse.Namespace) -> None:
    modules = [(stem, shape) for stem, shape in shapes() if stem.startswith(_BLOCKS)]
    inputs = [
        str(make(folder / f"{seed}.safetensors", rank=asked.rank, seed=seed, modules=modules))
        for seed in range(max(asked.counts))
    ]
    each = Path(inputs[0]).stat().st_size / 1e6
    print(f"{len(modules)} modules, rank {asked.rank}, float16, {each:.1f} MB each, one thread")
    print("| adapters | reading, s | comparing, s | ratio | ms per adapter | µs per pair and module | MB |")
    print("|---|---|---|---|---|---|---|")
    for count in asked.counts:
        took = _measured(inputs[:count])
        pairs = count * (count + 1) / 2 * len(modules)
        own = took["compare"] - took["read"]
        print(
            f"| {count} | {took['read']:.2f} | {took['compare']:.2f} | {took['compare'] / took['read']:.1f} "
            f"| {1e3 * took['compare'] / count:.0f} | {1e6 * own / pairs:.0f} | {took['bytes'] / 1e6:.0f} |",
            flush=True,
        )


def _measured(inputs: list[str]) -> dict[str, float]:
    command = [PYTHON, "-m", "tests.bench.compare", "--one", *inputs]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(ran.stdout)
    return found


def _one(paths: list[str]) -> dict[str, float]:
    """CPU seconds of reading and of comparing, and the most memory of the comparison."""
    import torch

    from loratools.io.reader import open_tensors
    from loratools.ops.compare import compare

    torch.set_num_threads(1)
    start = time.process_time()
    for path in paths:
        with open_tensors(path) as file:
            for ref in file.tensors.values():
                ref.load().sum(dtype=torch.float64)
    read = time.process_time() - start
    with _Watched() as watched:
        start = time.process_time()
        compare(paths, threads=1)
        took = time.process_time() - start
    return {"read": read, "compare": took, "bytes": watched.most - watched.before}


class _Watched:
    """The most anonymous memory of this process, in bytes, looked up again and again."""

    def __init__(self) -> None:
        self.before = self.most = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(_INTERVAL):
            self.most = max(self.most, _anonymous())


def _anonymous() -> int:
    """Memory that no file stands behind, in bytes; Linux tells it."""
    if not sys.platform.startswith("linux"):
        raise SystemExit("anonymous memory is only told by Linux' /proc")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon")


if __name__ == "__main__":
    main()
