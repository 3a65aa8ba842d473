"""Baking and extracting undo each other: at full rank to rounding, whatever the kind of the module."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loratools.model import Adapter, Layout, Module, Target
from loratools.ops.bake import bake
from loratools.ops.extract import extract
from loratools.tensors import from_torch
from tests.kinds import samples as make

SEEDS = st.integers(0, 2**31 - 1)
# Of float32: the sum is rounded once, and twice more on the way back.
TOLERANCE = 4 * 2.0**-24


def adapter_of(*modules: Module) -> Adapter:
    return Adapter({module.target: module for module in modules}, arch="unknown", layout=Layout("lycoris"))


def spread(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())


@pytest.mark.parametrize("name", make.NAMES)
@settings(max_examples=4, deadline=None)
@given(seed=SEEDS, strength=st.sampled_from([1.0, -0.5, 2.0]))
def test_extracting_at_full_rank_is_the_identity(name: str, seed: int, strength: float) -> None:
    module, weight, delta = make.sample(name, seed)
    base = {"w.weight": torch.from_numpy(weight).float(), "w.bias": torch.arange(float(len(weight)))}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{word}.safetensors" for word in ("base", "baked", "again")]
        save_file(base, paths[0])
        bake(paths[0], [adapter_of(module)], paths[1], weights=[strength])
        baked = load_file(paths[1])
        wanted = torch.from_numpy(weight + strength * delta)
        scale = spread(wanted) + spread(base["w.weight"])
        assert spread(baked["w.weight"].double() - wanted) <= 40 * TOLERANCE * scale

        found, _ = extract(
            paths[0], paths[1], rank=min(weight.reshape(len(weight), -1).shape), dtype="float32"
        )
        assert found is not None
        bake(paths[0], [found], paths[2], precise=True)
        again = load_file(paths[2])
        assert again.keys() == base.keys()
        assert spread(again["w.weight"] - baked["w.weight"]) <= 8 * TOLERANCE * scale
        assert torch.equal(again["w.bias"], baked["w.bias"])


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_biases_and_norms_come_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = {
        "layer.weight": torch.from_numpy(rng.normal(size=(6, 5))).float(),
        "layer.bias": torch.from_numpy(rng.normal(size=6)).float(),
        "norm.weight": torch.from_numpy(rng.normal(size=6)).float(),
        "norm.bias": torch.from_numpy(rng.normal(size=6)).float(),
    }
    tuned = {
        key: value + torch.from_numpy(rng.normal(size=value.shape)).float() for key, value in base.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{word}.safetensors" for word in ("base", "tuned", "again")]
        save_file(base, paths[0])
        save_file(tuned, paths[1])
        found, report = extract(paths[0], paths[1], rank=5, full_small=True, dtype="float32")
        assert found is not None
        assert not report.left_out
        bake(paths[0], [found], paths[2])
        again = load_file(paths[2])
    for key, wanted in tuned.items():
        assert spread(again[key] - wanted) <= 8 * TOLERANCE * (spread(wanted) + spread(base[key])), key


def lora(path: str, up: torch.Tensor, down: torch.Tensor, scale: float = 1.0) -> Module:
    factors = {"up": from_torch("", up), "down": from_torch("", down)}
    return Module(
        Target("model", path), "lora", factors, scale=scale, rank=len(down), shape=(len(up), down.shape[1])
    )


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, count=st.integers(1, 4))
def test_several_adapters_are_the_sum(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(9, 7))
    pairs = [(rng.normal(size=(9, rank)), rng.normal(size=(rank, 7))) for rank in range(1, count + 1)]
    strengths = [float(value) for value in rng.normal(size=count)]
    wanted = weight + sum(s * up @ down for s, (up, down) in zip(strengths, pairs, strict=True))
    adapters = [adapter_of(lora("w", torch.from_numpy(up), torch.from_numpy(down))) for up, down in pairs]
    with tempfile.TemporaryDirectory() as folder:
        base, output = Path(folder) / "base.safetensors", Path(folder) / "baked.safetensors"
        save_file({"w.weight": torch.from_numpy(weight).double()}, base)
        report = bake(base, adapters, output, weights=strengths, precise=True)
        found = load_file(output)["w.weight"]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-13 * np.abs(wanted).max() * 10)
    assert report.tensors[0].adapters == tuple(range(count))
    assert report.tensors[0].norm == pytest.approx(np.linalg.norm(wanted - weight), rel=1e-6)


def test_a_weight_of_zero_changes_nothing(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w.weight": torch.randn(6, 4, generator=generator).half(), "other": torch.arange(5)}
    save_file(base, tmp_path / "base.safetensors", {"format": "pt"})
    adapter = adapter_of(
        lora("w", torch.randn(6, 2, generator=generator), torch.randn(2, 4, generator=generator))
    )
    bake(tmp_path / "base.safetensors", [adapter], tmp_path / "out.safetensors", weights=[0.0])
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()
