"""Time, memory and energy of merging 2, 8 and 32 rank-16 adapters by methods of every sort.

The adapters have the modules of two transformer blocks of SDXL's UNet, 640 and 1280 wide: 20 modules. Every merge is a
process of its own. Seconds are of the merge and of writing its result, without the start of Python; memory is the most
that was resident beyond what importing torch and loratools took. Energy is the share of Σσ² that the result's rank
holds of the method's own full-rank result.

Run: python -m tests.bench.merge_methods [--counts 2 8 32] [--methods linear ties …] [--rank N]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench._common import PYTHON, make, shapes

METHODS = ("linear", "ties", "knots-ties", "core-ties", "tsv", "iso-c")
_BLOCKS = ("input_blocks_4_1_transformer_blocks_0", "middle_block_1_transformer_blocks_0")


def main() -> None:
    """Print the table, or what one merge took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rank", type=int, default=None, help="of the result; default: whole, or the sum")
    parser.add_argument(
        "--one", nargs="+", metavar="PATH", help="the output and the inputs of a single merge"
    )
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(_one(asked.methods[0], asked.one[1:], asked.one[0], asked.rank)))
        return
    with tempfile.TemporaryDirectory() as name:
        _table(Path(name), asked)


def _table(folder: Path, asked: argparse.Namespace) -> None:
    modules = [(stem, shape) for stem, shape in shapes() if any(block in stem for block in _BLOCKS)]
    inputs = [
        str(make(folder / f"{seed}.safetensors", rank=16, seed=seed, modules=modules))
        for seed in range(max(asked.counts))
    ]
    print(f"{len(modules)} modules, rank 16; result of {f'rank {asked.rank}' if asked.rank else 'full rank'}")
    print("| method | adapters | seconds | ms per adapter and module | MB | energy | ranks |")
    print("|---|---|---|---|---|---|---|")
    for method in asked.methods:
        for count in asked.counts:
            took = _measured(method, inputs[:count], folder / "merged.safetensors", asked.rank)
            each = 1000 * took["seconds"] / count / len(modules)
            print(
                f"| {method} | {count} | {took['seconds']:.2f} | {each:.2f} | {took['bytes'] / 1e6:.0f} "
                f"| {took['energy']:.3f} | {took['ranks']} |",
                flush=True,
            )
            for note in took["notes"]:
                print(f"  {note}")


def _measured(method: str, inputs: list[str], output: Path, rank: int | None) -> dict[str, Any]:
    command = [PYTHON, "-m", "tests.bench.merge_methods", "--methods", method]
    command += ["--rank", str(rank)] if rank else []
    output.unlink(missing_ok=True)
    ran = subprocess.run(
        [*command, "--one", str(output), *inputs], check=True, capture_output=True, text=True
    )
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def _one(method: str, inputs: list[str], output: str, rank: int | None) -> dict[str, Any]:
    from loratools.ops.merge import merge_files

    before, start = _resident(), time.perf_counter()
    weights = [1 / len(inputs)] * len(inputs)
    report = merge_files(inputs, output, method=method, weights=weights, rank=rank)
    return {
        "seconds": time.perf_counter() - start,
        "bytes": _resident() - before,
        "energy": report.energy,
        "ranks": ", ".join(str(each) for each in report.ranks),
        "notes": list(report.notes),
    }


def _resident() -> int:
    """The most bytes that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
