"""SDXL-shaped adapters, and commands timed in turn."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

TEXT = 2048


def shapes() -> Iterator[tuple[str, tuple[int, int]]]:
    """The 794 modules that Kohya's trainer adapts in SDXL's UNet and first text encoder, with (out, in)."""
    wide = [(f"input_blocks_{n}_1", 1280, 10) for n in (7, 8)] + [("middle_block_1", 1280, 10)]
    wide += [(f"output_blocks_{n}_1", 1280, 10) for n in (0, 1, 2)]
    narrow = [(f"{side}_blocks_{n}_1", 640, 2) for side, n in (("input", 4), ("input", 5))]
    narrow += [(f"output_blocks_{n}_1", 640, 2) for n in (3, 4, 5)]
    for block, width, depth in wide + narrow:
        for name in ("proj_in", "proj_out"):
            yield f"lora_unet_{block}_{name}", (width, width)
        for layer in range(depth):
            stem = f"lora_unet_{block}_transformer_blocks_{layer}"
            for name in (
                "attn1_to_q",
                "attn1_to_k",
                "attn1_to_v",
                "attn1_to_out_0",
                "attn2_to_q",
                "attn2_to_out_0",
            ):
                yield f"{stem}_{name}", (width, width)
            for name in ("attn2_to_k", "attn2_to_v"):
                yield f"{stem}_{name}", (width, TEXT)
            yield f"{stem}_ff_net_0_proj", (8 * width, width)
            yield f"{stem}_ff_net_2", (width, 4 * width)
    for layer in range(12):
        stem = f"lora_te1_text_model_encoder_layers_{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{stem}_self_attn_{name}", (768, 768)
        yield f"{stem}_mlp_fc1", (3072, 768)
        yield f"{stem}_mlp_fc2", (768, 3072)


def flux_shapes() -> Iterator[tuple[str, tuple[int, int]]]:
    """The 304 modules of Flux.1's transformer that Kohya's trainer adapts, fused as they are there, with (out, in)."""
    width = 3072
    for block in range(19):
        for stream in ("img", "txt"):
            stem = f"lora_unet_double_blocks_{block}_{stream}"
            yield f"{stem}_attn_qkv", (3 * width, width)
            yield f"{stem}_attn_proj", (width, width)
            yield f"{stem}_mlp_0", (4 * width, width)
            yield f"{stem}_mlp_2", (width, 4 * width)
            yield f"{stem}_mod_lin", (6 * width, width)
    for block in range(38):
        stem = f"lora_unet_single_blocks_{block}"
        yield f"{stem}_linear1", (7 * width, width)
        yield f"{stem}_linear2", (width, 5 * width)
        yield f"{stem}_modulation_lin", (3 * width, width)


def make(
    path: Path,
    *,
    rank: int = 32,
    seed: int = 0,
    modules: Iterable[tuple[str, tuple[int, int]]] | None = None,
    version: str = "sdxl_base_v1-0",
) -> Path:
    """A Kohya file in float16, with Gaussian factors.

    Args:
        path: The output.
        rank: Of every module.
        seed: Of the values.
        modules: Names and (out, in); default: the SDXL-shaped ones.
        version: The base model that its metadata names.
    """
    generator = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for stem, (out, width) in shapes() if modules is None else modules:
        tensors[f"{stem}.alpha"] = np.array(rank / 2, np.float16)
        tensors[f"{stem}.lora_down.weight"] = _normal(generator, (rank, width))
        tensors[f"{stem}.lora_up.weight"] = _normal(generator, (out, rank))
    save_file(tensors, path, {"ss_base_model_version": version, "ss_network_dim": str(rank)})
    return path


def _normal(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return (generator.standard_normal(shape, np.float32) / np.sqrt(shape[1])).astype(np.float16)


def timed(command: list[str]) -> float:
    """Seconds that a command takes as a whole process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "120"})
    return time.perf_counter() - start


class Compared(NamedTuple):
    """Two commands that ran in turn.

    Attributes:
        ratio: The median of the pairwise ratios of their times.
        mine: The median time of the first, seconds.
        theirs: Of the second.
    """

    ratio: float
    mine: float
    theirs: float


def compare(name: str, ours: list[str], other: list[str], runs: int = 21) -> Compared:
    """Run two commands in turn and print the median of the pairwise ratios."""
    timed(ours), timed(other)
    pairs = [(timed(ours), timed(other)) for _ in range(runs)]
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{name}: {mine * 1000:.0f} ms against {theirs * 1000:.0f} ms, ratio {ratio:.2f}")
    return Compared(ratio, mine, theirs)


PYTHON = sys.executable
# As it is installed for users; `python -m` would import more.
LORATOOLS = shutil.which("loratools", path=os.path.dirname(PYTHON)) or "loratools"
