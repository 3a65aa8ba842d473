"""Conversions stream: what is in memory at a time is less than two of the largest modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
RANK, WIDTH = 512, 2048
LITTLE = 4 << 20  # tensors that wait to be hashed, and rows that were widened

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="anonymous memory is read from Linux's /proc"
)

# Converts the small adapter, so that everything is imported, and then the large one, whose peak is taken.
CHILD = """
import gc, json, os, sys, threading
from loratools.ops.convert import convert_file

statm = os.open("/proc/self/statm", os.O_RDONLY)
page = os.sysconf("SC_PAGE_SIZE")

def anonymous():
    _, resident, shared, *_ = os.pread(statm, 200, 0).split()
    return (int(resident) - int(shared)) * page

class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.found = 0
    def run(self):
        while not self.over.wait(0.0003):
            self.found = max(self.found, anonymous())

sys.setswitchinterval(0.0003)
found = {}
for name, (small, large, options) in json.loads(sys.argv[1]).items():
    for check in (False, True):
        output = options.pop("output")
        convert_file(small, output, arch="flux", check=check, overwrite=True, **options)
        gc.collect()
        before, peak = anonymous(), Peak()
        peak.start()
        convert_file(large, output, arch="flux", check=check, overwrite=True, **options)
        peak.over.set()
        peak.join()
        found[f"{name} {'verified' if check else 'unverified'}"] = peak.found - before
        options["output"] = output
print(json.dumps(found))
"""


def values(*shape: int, dtype: type = np.float16, seed: int) -> np.ndarray:
    some = np.random.default_rng(seed).standard_normal(9973).astype(dtype)
    return np.resize(some, shape)


def module(stem: str, factors: tuple[str, str], parts: int, rank: int, width: int, seed: int) -> dict:
    up, down = factors
    found = {
        f"{stem}.{up}.weight": values(parts * width, rank, seed=seed),
        f"{stem}.{down}.weight": values(rank, width, seed=seed + 1),
    }
    if "lora_up" in up:
        found[f"{stem}.alpha"] = np.array(0.7 * rank, np.float32)
    return found


def fused(path: Path, rank: int, width: int) -> str:
    """Kohya's names: the projections to q, k and v as one weight."""
    tensors: dict[str, np.ndarray] = {}
    for block in range(2):
        stem = f"lora_unet_double_blocks_{block}_img_attn"
        tensors |= module(f"{stem}_qkv", ("lora_up", "lora_down"), 3, rank, width, 10 * block)
        tensors |= module(f"{stem}_proj", ("lora_up", "lora_down"), 1, rank, width, 10 * block + 5)
    save_file(tensors, path)
    return str(path)


def split(path: Path, rank: int, width: int) -> str:
    """diffusers' names, with a down factor of its own for each of q, k and v."""
    tensors: dict[str, np.ndarray] = {}
    for place, name in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
        stem = f"transformer.transformer_blocks.0.attn.{name}"
        tensors |= module(stem, ("lora_B", "lora_A"), 1, rank, width, 10 * place)
    save_file(tensors, path)
    return str(path)


# By case: whether the input is fused, the options, and the bytes of the largest module read or written.
WHOLE = 2 * (3 * WIDTH * RANK + RANK * WIDTH)
BLOCKS = 2 * (3 * WIDTH * 3 * RANK + 3 * RANK * WIDTH)
CASES = {
    "names and digests": (True, {"to": "kohya"}, WHOLE),
    "splits": (True, {"to": "diffusers"}, WHOLE),
    "fuses": (False, {"to": "kohya"}, BLOCKS),
    "casts up": (True, {"to": "kohya", "dtype": "float32"}, 2 * WHOLE),
    "casts down": (True, {"to": "comfy", "dtype": "bfloat16"}, WHOLE),
    "folds": (True, {"to": "comfy", "fold": True}, WHOLE),
}


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, int]:
    """Anonymous bytes beyond those of a small conversion, by case."""
    folder = tmp_path_factory.mktemp("memory")
    files = {
        (is_fused, size): (fused if is_fused else split)(folder / f"{is_fused}{size}.safetensors", *size)
        for is_fused in (True, False)
        for size in ((4, 16), (RANK, WIDTH))
    }
    output = str(folder / "out.safetensors")
    cases = {
        name: (files[is_fused, (4, 16)], files[is_fused, (RANK, WIDTH)], {**options, "output": output})
        for name, (is_fused, options, _) in CASES.items()
    }
    # Freed memory goes back to the system at once, so that what is there is what is held.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(cases)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", ["unverified", "verified"])
@pytest.mark.parametrize(
    "name",
    CASES,
)
def test_no_more_than_two_modules_are_held(name, check, peaks):
    largest = CASES[name][2]
    assert peaks[f"{name} {check}"] < 2 * largest + LITTLE
