"""Packing libraries of adapters: time for each and peak memory, against reading and writing the same files.

The adapters have a 7B model's header, 32 layers of 7 modules, at rank 8 and small widths, so that what is measured is
the work beside reading and writing. Both are processes that time themselves behind their imports; copying reads every
file with the safetensors package, writes it with it, and does nothing else.

Run: python -m tests.bench.pack [--counts 500 1000 2000] [--shared-basis 8]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

COUNTS = (100, 200, 400)
RANK = 8
_SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
_CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj", "v_proj"]}
_OPTIONS: dict[str, object] = {"ranks": [8, 16], "runtime": "vllm"}
_PACK = """
import sys, time, loratools as lt
from loratools.ops import pack
start = time.perf_counter()
lt.pack([sys.argv[1]], sys.argv[2], **eval(sys.argv[3]))
print(time.perf_counter() - start)
"""
_COPY = """
import pathlib, sys, time
from safetensors.numpy import load_file, save_file
source, goal = map(pathlib.Path, sys.argv[1:3])
start = time.perf_counter()
for file in sorted(source.glob("*/*.safetensors")):
    place = goal / file.relative_to(source)
    place.parent.mkdir(parents=True)
    save_file(load_file(file), place, {"format": "pt"})
    (place.parent / "adapter_config.json").write_bytes((file.parent / "adapter_config.json").read_bytes())
print(time.perf_counter() - start)
"""


def adapter(folder: Path, seed: int) -> None:
    """One PEFT folder in float16."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(32):
        for name, (out, width) in _SHAPES.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = generator.standard_normal((RANK, width)).astype(np.float16)
            tensors[f"{stem}.lora_B.weight"] = generator.standard_normal((out, RANK)).astype(np.float16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(_CONFIG), "utf-8")


def measured(code: str, source: Path, goal: Path, options: dict[str, object]) -> tuple[float, float]:
    """Seconds that a process says it took, and MiB of memory that it had at most."""
    command = [sys.executable, "-c", code, str(source), str(goal), repr(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the process ended with status {status}")
    return float(said), _resident(used) / 2**20


def _resident(used: resource.struct_rusage) -> int:
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print times, memory and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--shared-basis", type=int, default=0, help="of this rank, instead of adapters")
    asked = parser.parse_args()
    options = {"shared_basis": asked.shared_basis} if asked.shared_basis else _OPTIONS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = 0
        print(
            f"{'adapters':>9} {'pack s':>8} {'ms each':>8} {'MiB':>6} {'copy s':>8} {'ms each':>8} {'ratio':>6}"
        )
        for count in sorted(asked.counts):
            while made < count:
                adapter(folder / f"lib/a{made:05}", made)
                made += 1
            packed, memory = measured(_PACK, folder / "lib", folder / f"packed{count}", options)
            copied, _ = measured(_COPY, folder / "lib", folder / f"copied{count}", {})
            print(
                f"{count:9,} {packed:8.2f} {1000 * packed / count:8.2f} {memory:6.0f} "
                f"{copied:8.2f} {1000 * copied / count:8.2f} {packed / copied:6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
