"""The time that a bake is said to take: what it is made of."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from loratools.io.base import keys_of
from loratools.ops import _bake_estimate
from loratools.ops._bake_run import Options
from loratools.ops._bake_shards import ShardPlan

SIZE = 1 << 20


@pytest.fixture
def shard(tmp_path):
    save_file({"w": torch.zeros(SIZE, dtype=torch.uint8)}, tmp_path / "base.safetensors")
    base = keys_of(tmp_path / "base.safetensors")
    return ShardPlan(base.shards[0], "out", "copy", (), (), (), {}, {}, base.parts[""])


def test_waiting_for_the_disk_is_counted_once_and_planning_is(shard, tmp_path, monkeypatch):
    monkeypatch.setattr(_bake_estimate, "_copied", lambda _, __, size: 0.25 + size / 1e6)
    found = _bake_estimate.estimate([shard], Options(), str(tmp_path / "out"), 50_000_000, planning=2.0)
    assert found.copy_rate == pytest.approx(1e6, rel=0.01)
    assert found.seconds == pytest.approx(2.0 + 50.0 + 0.25, rel=0.01)


def test_the_probe_leaves_nothing_behind(shard, tmp_path):
    found = _bake_estimate.estimate([shard], Options(), str(tmp_path / "out"), SIZE)
    assert found.seconds > 0
    assert found.copy_rate > 0
    assert [each.name for each in tmp_path.iterdir()] == ["base.safetensors"]
