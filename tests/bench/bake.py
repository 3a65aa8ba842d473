"""Baking against copying the checkpoint to the disk, as whole processes taken in turn, and the memory it takes.

From a bake the start of Python and torch is subtracted, measured in the same round; a copy is ``cp`` and the flush of
what it wrote. Memory is the most that the process had resident, beyond that of one that imports torch.

Run: python -m tests.bench.bake [--rounds N] [--twice]
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.bench._checkpoints import llama, llama_adapter, sd15, sd15_adapter, write, write_sharded
from tests.bench._common import LORATOOLS, PYTHON

_TORCH = [PYTHON, "-c", "import torch"]


class Run(NamedTuple):
    """A process that ended.

    Attributes:
        seconds: From start to end.
        peak: The most that it had resident, in bytes.
    """

    seconds: float
    peak: int


def measured(command: list[str]) -> Run:
    """Run a command to its end.

    Raises:
        SystemExit: It failed.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return Run(time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def copy(source: Path, target: Path) -> float:
    """Seconds that ``cp`` and flushing the copy take."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in [target] if target.is_file() else sorted(target.iterdir()):
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    return time.perf_counter() - started


def remove(path: Path) -> None:
    """Remove a file or a folder, and have that on the disk before the next is timed."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    os.sync()


def compare(what: str, base: Path, adapter: Path, rounds: int) -> None:
    """Print the ratio of baking to copying, and the memory."""
    output = base.with_name("baked" + base.suffix)
    command = [LORATOOLS, "bake", str(base), str(adapter), "-o", str(output), "--quiet"]
    found: list[tuple[float, float, float]] = []
    beyond = 0
    for number in range(rounds + 1):
        start = measured(_TORCH)
        # In turn, now one first and now the other: a disk still busy with the one delays the next.
        copied = copy(base, output) if number % 2 else 0.0
        remove(output)
        baked = measured(command)
        remove(output)
        copied = copied or copy(base, output)
        remove(output)
        beyond = max(beyond, baked.peak - start.peak)
        if number:  # the first warms the cache
            found.append((baked.seconds, start.seconds, copied))
    ratio = statistics.median((baked - start) / copied for baked, start, copied in found)
    baked, start, copied = (statistics.median(column) for column in zip(*found, strict=True))
    print(f"{what}: {baked:.2f} s, {baked - start:.2f} s beyond the start of torch ({start:.2f} s);")
    print(f"  cp and fsync {copied:.2f} s; ratio {ratio:.2f}; {beyond / 2**20:.0f} MiB beyond torch's own")


def main() -> None:
    """Print times, ratios and memory."""
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 5
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        base = write(folder / "sd15.safetensors", sd15())
        adapter = sd15_adapter(folder / "style.safetensors")
        compare(
            f"SD1.5, float16, {base.stat().st_size / 1e9:.1f} GB, 264 modules of rank 32",
            base,
            adapter,
            rounds,
        )
        remove(base)
        for layers in (16, 32) if "--twice" in sys.argv else (16,):
            model = write_sharded(folder / f"llama{layers}", llama(layers))
            peft = llama_adapter(folder / f"peft{layers}", layers)
            size = sum(file.stat().st_size for file in model.iterdir()) / 1e9
            compare(
                f"Llama, bfloat16, sharded, {size:.1f} GB, {7 * layers} modules of rank 32",
                model,
                peft,
                rounds,
            )
            remove(model)


if __name__ == "__main__":
    main()
