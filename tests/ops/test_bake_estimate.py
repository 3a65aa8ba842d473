"""What a bake is said to take: what it is made of."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from loratools.engine.local import Local
from loratools.io.base import keys_of
from loratools.ops import _bake_estimate
from loratools.ops._bake_run import Options
from loratools.ops._bake_shards import ShardPlan
from loratools.ops.bake import bake

SIZE = 1 << 20
WIDTH, RANK = 64, 4


@pytest.fixture
def shard(tmp_path):
    save_file({"w": torch.zeros(SIZE, dtype=torch.uint8)}, tmp_path / "base.safetensors")
    base = keys_of(tmp_path / "base.safetensors")
    return ShardPlan(base.shards[0], "out", "copy", (), (), (), {}, {}, base.parts[""])


@pytest.fixture
def tuned(tmp_path):
    """A base of a matrix that an adapter changes and one that none does, and the adapter."""
    base, adapter = tmp_path / "model.safetensors", tmp_path / "adapter"
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(2)]
    save_file({f"{name}.weight": torch.randn(WIDTH, WIDTH) for name in names}, base)
    adapter.mkdir()
    stem = f"base_model.model.{names[0]}"
    factors = {"lora_A": torch.randn(RANK, WIDTH), "lora_B": torch.randn(WIDTH, RANK)}
    save_file(
        {f"{stem}.{name}.weight": factor for name, factor in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def test_a_file_that_is_copied_takes_as_long_as_copying_it(shard, tmp_path, monkeypatch):
    monkeypatch.setattr(_bake_estimate, "_copied", lambda _, __, size: 0.25 + size / 1e5)
    found = _bake_estimate.estimate([shard], Options(), str(tmp_path / "out"), planning=2.0)
    assert found.copy_rate == pytest.approx(1e5, rel=0.01)
    assert found.whole.sequential >= 2.0
    assert found.whole.seconds - found.whole.sequential == pytest.approx(shard.shard.size / 1e5, rel=0.01)
    assert (found.whole.read, found.whole.written) == (shard.shard.size, shard.shard.size)


def test_the_probe_leaves_nothing_behind(shard, tmp_path):
    found = _bake_estimate.estimate([shard], Options(), str(tmp_path / "out"))
    assert found.whole.seconds > 0
    assert found.copy_rate > 0
    assert [each.name for each in tmp_path.iterdir()] == ["base.safetensors"]


class _Elsewhere:
    """An engine of other processes that is never asked to run anything."""

    remote = True
    devices = ()
    device_kind = "cpu"
    workers = 3


def test_elsewhere_workers_copy_too(shard, tmp_path):
    found = _bake_estimate.estimate([shard], Options(), str(tmp_path / "out"), engine=_Elsewhere()).whole
    assert found.workers == 3
    assert (found.read, found.written) == (shard.shard.size, shard.shard.size)
    assert found.peak == found.memory  # a single task keeps one of them busy


@pytest.mark.parametrize(("engine", "workers"), [(None, 5), (Local(3), 3), (_Elsewhere(), 3)])
def test_tensors_that_change_are_computed_and_all_bytes_are_counted(tuned, tmp_path, engine, workers):
    base, adapter = tuned
    report = bake(base, [adapter], tmp_path / "out.safetensors", dry_run=True, threads=5, engine=engine)
    found = report.estimate.whole
    factors = 2 * RANK * WIDTH * 4
    assert found.workers == workers
    assert found.read == base.stat().st_size + factors
    assert found.written == base.stat().st_size
    assert report.estimate.compute_rate > 0
    assert found.memory > 0
    assert 0 < found.efficiency <= 1
    assert not (tmp_path / "out.safetensors").exists()
