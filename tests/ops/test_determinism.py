"""What does not depend on threads, on the order of sets, or on how work is grouped.

A bake's bytes are the same on any number of threads. An extraction's are the same on any number of threads of ours; the
threads of the matrix library itself (OMP_NUM_THREADS, where scipy's LAPACK is asked) may round the factors otherwise:
their products agree to rounding.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file

from loratools.io.base import keys_of
from loratools.ops._extract_batched import run as batched
from loratools.ops._extract_jobs import work
from loratools.ops._extract_options import options
from loratools.ops._extract_plan import compare
from loratools.ops._extract_side import sides
from loratools.ops._extract_tensor import FACTORS, Found, Job, extract_tensor
from loratools.ops.bake import bake
from loratools.ops.extract import extract
from tests.ops import checkpoints as make
from tests.ops import sd15_checkpoints

ROOT = Path(__file__).resolve().parents[2]
RULES = {"energy": None, "ratio": None, "error": None, "size": None}

PROGRAM = """
import sys
import loratools as lt
base, adapter, tuned, folder = sys.argv[1:]
for rounding in ("nearest", "stochastic", "compensated"):
    lt.bake(base, [adapter], f"{folder}/{rounding}.safetensors", rounding=rounding, seed=1, dtype="bfloat16")
for svd in ("exact", "randomized"):
    found = lt.extract(base, tuned, rank=5, svd=svd, dtype="float32")
    lt.save(found, f"{folder}/{svd}.safetensors", layout="kohya")
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, an adapter for it, and a tuned checkpoint with a matrix that is worth more than one thread."""
    adapter = factories.kohya(tmp_path / "style.safetensors", "sd15", seed=1).path
    state = sd15_checkpoints.tensors(torch.float32)
    key = "model.diffusion_model.input_blocks.2.1.proj_in.weight"
    state[key] = make.random((320, 288, 1, 1), 5)
    tuned = {name: value + make.random(tuple(value.shape), 7, 0.01) for name, value in state.items()}
    return (
        sd15_checkpoints.safetensors(tmp_path / "base.safetensors", state),
        adapter,
        sd15_checkpoints.safetensors(tmp_path / "tuned.safetensors", tuned),
    )


def outputs(files: tuple[Path, Path, Path], folder: Path, **variables: str) -> dict[str, Path]:
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, files), str(folder)],
        check=True,
        cwd=ROOT,
        env={**os.environ, **variables},
        timeout=120,
    )
    return {path.stem: path for path in folder.iterdir()}


def products(path: Path) -> dict[str, torch.Tensor]:
    state = load_file(path)
    stems = {key.partition(".")[0] for key in state}
    return {
        stem: state[f"{stem}.lora_up.weight"].flatten(1).double()
        @ state[f"{stem}.lora_down.weight"].flatten(1).double()
        for stem in sorted(stems)
    }


def test_neither_hashes_nor_threads_of_the_process_matter(files, tmp_path: Path) -> None:
    one = outputs(files, tmp_path / "one", PYTHONHASHSEED="1", OMP_NUM_THREADS="1")
    two = outputs(files, tmp_path / "two", PYTHONHASHSEED="2", OMP_NUM_THREADS="3")
    for name in ("nearest", "stochastic", "compensated"):
        assert one[name].read_bytes() == two[name].read_bytes()
    for name in ("exact", "randomized"):
        found, other = products(one[name]), products(two[name])
        assert list(load_file(one[name])) == list(load_file(two[name]))
        assert found.keys() == other.keys()
        for stem, product in found.items():
            assert float((product - other[stem]).norm()) <= 1e-5 * float(product.norm())


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_our_own_threads_do_not_matter(files, tmp_path: Path, svd: str) -> None:
    base, adapter, tuned = files
    digests, reports = set(), []
    for threads in (1, 2, 5):
        out = tmp_path / f"{threads}.safetensors"
        _, report = extract(base, tuned, out, rank=4, svd=svd, threads=threads, full_small=True)
        digests.add(hashlib.blake2b(out.read_bytes()).hexdigest())
        reports.append(report.modules)
    assert len(digests) == 1
    assert reports[0] == reports[1] == reports[2]
    made = []
    for threads in (1, 4):
        out = tmp_path / f"baked{threads}.safetensors"
        made.append(bake(base, [adapter], out, threads=threads, rounding="stochastic", dtype="float16"))
        digests.add(hashlib.blake2b(out.read_bytes()).hexdigest())
    assert len(digests) == 2
    assert made[0].tensors == made[1].tensors


def jobs_of(base: Path, tuned: Path) -> list[Job]:
    asked = options(
        {"rank": 4, **RULES},
        max_rank=None,
        min_rank=1,
        conv_rank=None,
        components=None,
        include=(),
        exclude=(),
        dtype="float32",
        svd="randomized",
        tolerance=1e-3,
        seed=3,
        embeddings=False,
        full_small=False,
    )
    return list(work(compare(*sides(keys_of(base), keys_of(tuned), None), asked), asked, replaces=False).jobs)


def product(found: Found) -> torch.Tensor:
    assert found.up is not None
    assert found.down is not None
    return found.up.double().t() @ found.down.double()


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_batches_of_any_size_give_what_single_work_gives(files, batch: int) -> None:
    jobs = jobs_of(files[0], files[2])
    found = {each.number: each for each in batched(reversed(jobs), "cpu", batch=batch)}
    assert found.keys() == {job.number for job in jobs}
    for job in jobs:
        one, other = extract_tensor(job), found[job.number]
        assert one.norm == pytest.approx(other.norm, rel=1e-6)
        if job.task == FACTORS and one.norm:
            assert one.method == other.method
            assert len(one.sigma) == len(other.sigma)
            assert float((product(one) - product(other)).norm()) <= 1e-5 * one.norm
