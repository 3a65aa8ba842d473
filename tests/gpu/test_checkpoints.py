"""Checkpoints on a GPU: baked, extracted and verified as on the CPU, within bounded memory, copies beside the work."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file

from loratools.maths.rank import Rule
from loratools.ops import _extract_batched
from loratools.ops._bake_tensor import BakeJob, bake_tensor
from loratools.ops._changes import Piece
from loratools.ops._extract_tensor import FACTORS, Found, Job, extract_tensor
from loratools.ops.bake import bake
from loratools.ops.extract import extract
from loratools.ops.verify import verify
from tests.kinds import samples
from tests.ops import sd15_checkpoints
from tests.ops.baking import Disk, change_of, normal, term

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

MEBI = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and an adapter for it."""
    state = sd15_checkpoints.tensors()
    adapter = factories.kohya(tmp_path / "style.safetensors", "sd15", seed=1).path
    return sd15_checkpoints.safetensors(tmp_path / "base.safetensors", state), adapter


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("name", samples.NAMES)
def test_a_module_of_any_kind_is_baked_as_on_the_cpu(
    tmp_path: Path, name: str, precise: bool, rounding: str
) -> None:
    module, base, _ = samples.sample(name)
    change = change_of(Disk(tmp_path).put(base), term(module, 0.7))
    job = BakeJob(change, precise=precise, rounding=rounding, dtype="F32")
    here, there = bake_tensor(job), bake_tensor(job._replace(device="cuda"))
    assert there.data.device.type == "cpu"
    torch.testing.assert_close(there.data, here.data, rtol=1e-5, atol=1e-5)
    assert there.result.norm == pytest.approx(here.result.norm, rel=1e-5)


def test_a_checkpoint_is_baked_and_verified(files: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = files
    for device in ("cpu", "cuda"):
        bake(base, [adapter], tmp_path / f"{device}.safetensors", device=device)
    here, there = (load_file(tmp_path / f"{device}.safetensors") for device in ("cpu", "cuda"))
    changed = sum(int((here[key] != there[key]).sum()) for key in here)
    # Sums in float32 that are rounded otherwise move few values across the middle between two.
    assert changed <= 0.01 * sum(value.numel() for value in here.values())
    assert verify(base, [adapter], tmp_path / "cuda.safetensors").ok


def test_a_checkpoint_is_extracted_as_on_the_cpu(files: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = files
    tuned = tmp_path / "tuned.safetensors"
    bake(base, [adapter], tuned, weights=[3.0], dtype="float32")
    (here, one), (there, other) = (
        extract(base, tuned, rank=3, dtype="float32", device=device) for device in ("cpu", "cuda")
    )
    assert here is not None
    assert there is not None
    assert here.modules.keys() == there.modules.keys()
    for target, module in here.modules.items():
        delta = module.delta()
        assert float((delta - there.modules[target].delta()).norm()) <= 1e-3 * float(delta.norm())
    for found, wanted in zip(other.modules, one.modules, strict=True):
        assert found.error == pytest.approx(wanted.error, abs=1e-4)


def jobs(folder: Path, count: int, side: int) -> list[Job]:
    """Differences of one shape, a product of rank 16 and noise; every third is the same."""
    disk, pairs = Disk(folder), []
    for seed in range(3):
        base = normal(side, side, seed=seed)
        low = normal(side, 16, seed=1000 + seed) @ normal(16, side, seed=2000 + seed)
        tuned = base + low + 0.1 * normal(side, side, seed=3000 + seed)
        pairs.append([Piece(disk.put(values), ((0, side, 0),)) for values in (base, tuned)])
    rule = Rule("rank", 16)
    return [
        Job(number, str(number), one, (other,), (side, side), side, FACTORS, rule, store="F32")
        for number, (one, other) in zip(range(count), cycle(pairs), strict=False)
    ]


def agree(work: list[Job], found: dict[int, Found]) -> None:
    assert found.keys() == {job.number for job in work}
    for job in work:
        here, there = extract_tensor(job), found[job.number]
        assert there.up is not None
        assert there.up.device.type == "cpu"
        assert there.lost == pytest.approx(here.lost, rel=2e-3)


def test_memory_is_that_of_a_batch(tmp_path: Path) -> None:
    work = jobs(tmp_path, 60, 1536)
    list(_extract_batched.run(work[:2], "cuda"))  # what libraries keep for themselves is there from now on
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = {each.number: each for each in _extract_batched.run(work, "cuda", batch=2)}
    # 9 MiB each, 540 in all: two in a batch, eight ahead of it, and a few times as much for the decomposition.
    assert torch.cuda.max_memory_allocated() - before <= 300 * MEBI
    agree(work[:3], {number: found[number] for number in range(3)})


def test_copies_run_beside_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = _extract_batched._send, []

    def noted(*arguments: object) -> object:
        sent = original(*arguments)  # type: ignore[arg-type]
        seen.append(sent)
        return sent

    monkeypatch.setattr(_extract_batched, "_send", noted)
    work = jobs(tmp_path, 4, 256)
    agree(work, {each.number: each for each in _extract_batched.run(work, "cuda")})
    assert len(seen) == 4
    assert all(sent.pinned is not None and sent.pinned.is_pinned() for sent in seen)
    assert all(sent.arrived is not None for sent in seen)


@pytest.fixture
def tight() -> Iterator[None]:
    """Little memory for this process, whatever the device has."""
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 48 * MEBI) / whole)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_little_memory_is_enough(tight: None, tmp_path: Path) -> None:
    work = jobs(tmp_path, 12, 1024)
    agree(work, {each.number: each for each in _extract_batched.run(work, "cuda")})
