"""Compatibility methods reproduce PEFT's factor-wise merges: by hand, by its own code, and by its stored results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratools as lt
from loratools.errors import OptionError, ShapeError
from loratools.maths.lowrank import Factors
from loratools.methods import Options, Part, get
from loratools.ops.merge import merge_files

ORACLE = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracle"
NAMES = {"linear": "peft-linear", "ties": "peft-ties"}
# Linear, and a 3x3 convolution flattened to (out, in·9).
SHAPES = [(14, 11), (6, 36)]


def parts_of(shape, rank=3, weights=(0.7, -0.4, 1.3), dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)

    def draw(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    return [
        Part(Factors(draw(shape[0], rank), draw(rank, shape[1])), weight, 0.5 + place, place)
        for place, weight in enumerate(weights)
    ]


def element(values, weights, majority):
    """One element of PEFT's disjoint mean: an election without weights, and a mean of the weighted values."""
    votes = sum(values) if majority == "total" else sum((value > 0) - (value < 0) for value in values)
    sign = 1 if votes >= 0 else -1
    agreeing = [weight * value for value, weight in zip(values, weights, strict=True) if value * sign > 0]
    return sum(agreeing) / max(1, len(agreeing))


def trimmed(matrix, density):
    flat = [abs(value) for value in matrix.flatten().tolist()]
    count = int(density * len(flat))
    kept = set(sorted(range(len(flat)), key=lambda place: -flat[place])[:count])
    values = [value if place in kept else 0.0 for place, value in enumerate(matrix.flatten().tolist())]
    return torch.tensor(values, dtype=torch.float64).view_as(matrix)


def by_hand(parts, join):
    """Both factors merged on their own in float64."""
    roots = [math.sqrt(abs(part.multiplier)) for part in parts]
    signed = [root if part.multiplier >= 0 else -root for root, part in zip(roots, parts, strict=True)]
    up = join([part.factors.up.double() for part in parts], roots)
    return up, join([part.factors.down.double() for part in parts], signed)


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_adds_the_factors(shape):
    parts = parts_of(shape)
    found = get("peft-linear").combine(parts).factors
    up, down = by_hand(parts, lambda each, weights: sum(w * x for x, w in zip(each, weights, strict=True)))
    torch.testing.assert_close(found.up.double(), up, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.down.double(), down, rtol=1e-5, atol=1e-6)
    # That is another matrix than the weighted sum, which "linear" gives.
    exact = sum(part.multiplier * part.factors.delta() for part in parts)
    assert float((found.delta() - exact).norm() / exact.norm()) > 0.1


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.72, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_ties_trims_elects_and_averages_the_factors(shape, density, majority):
    def join(factors, weights):
        kept = [trimmed(factor, density).flatten().tolist() for factor in factors]
        values = [element(column, weights, majority) for column in zip(*kept, strict=True)]
        return torch.tensor(values, dtype=torch.float64).view_as(factors[0])

    parts = parts_of(shape)
    found = get("peft-ties").combine(parts, Options(density=density, majority=majority)).factors
    up, down = by_hand(parts, join)
    torch.testing.assert_close(found.up.double(), up, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.down.double(), down, rtol=1e-5, atol=1e-6)


def test_half_precision_is_computed_with_in_float32():
    parts = parts_of(SHAPES[0], dtype=torch.float16)
    wide = [Part(part.factors.to(torch.float32), part.weight, part.scale) for part in parts]
    for name in NAMES.values():
        found, expected = get(name).combine(parts).factors, get(name).combine(wide).factors
        assert found.up.dtype == torch.float32
        assert torch.equal(found.up, expected.up)
        assert torch.equal(found.down, expected.down)


@pytest.mark.parametrize("name", NAMES.values())
def test_ranks_must_be_equal_and_none_can_be_chosen(name):
    mixed = [parts_of(SHAPES[0], rank=2)[0], parts_of(SHAPES[0], rank=3)[1]]
    with pytest.raises(ShapeError, match=r"ranks 2, 3.*One rank.*linear or ties"):
        get(name).combine(mixed)
    with pytest.raises(OptionError, match="was given rank 2"):
        get(name).combine(parts_of(SHAPES[0]), Options(rank=2))


@pytest.mark.parametrize("name", NAMES.values())
def test_order_and_absence_change_nothing(name):
    parts = parts_of(SHAPES[0], weights=(0.7, -0.4))
    found = get(name).combine(parts).factors
    absent = Part(parts[0].factors, 0.0)
    for others in (parts[::-1], [parts[0], absent, parts[1]]):
        again = get(name).combine(others).factors
        assert torch.equal(found.up, again.up)
        assert torch.equal(found.down, again.down)


def combination_of(manifest):
    # One adapter by itself goes through "linear" in PEFT, whatever was asked for.
    params = manifest["params"]
    return "linear" if len(params["weights"]) == 1 else params["combination_type"]


def cases():
    if not ORACLE.is_dir():
        return [
            pytest.param(
                "", marks=pytest.mark.skip(reason="the reference results are not beside the repository")
            )
        ]
    found = []
    for folder in sorted(ORACLE.glob("peft_merge__*")):
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if combination_of(manifest) in NAMES:
            found.append(folder.name)
    assert len(found) >= 6
    return found


@pytest.mark.parametrize("case", cases())
def test_stored_results_of_peft_are_reproduced(case, tmp_path):
    folder = ORACLE / case
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    params = manifest["params"]
    chosen = {
        key: params[name]
        for name, key in (("density", "density"), ("majority_sign_method", "majority"))
        if combination_of(manifest) == "ties" and params.get(name) is not None
    }
    paths = [
        folder / manifest["inputs"][name]["path"] for name in sorted(manifest["inputs"]) if "adapter" in name
    ]
    merge_files(
        paths,
        tmp_path / "m",
        weights=params["weights"],
        method=NAMES[combination_of(manifest)],
        dtype="float32",
        **chosen,
    )
    expected = load_file(folder / "expected" / "merged" / "adapter_model.safetensors")
    found = load_file(tmp_path / "m" / "adapter_model.safetensors")
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor.float()), key
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text("utf-8"))
    assert config["lora_alpha"] == config["r"]


class Tiny(torch.nn.Module):
    """One linear layer and one convolution."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(11, 14)
        self.conv = torch.nn.Conv2d(4, 6, 3)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("weights", [(0.7, 0.5), (1.3, -0.4)])
@pytest.mark.parametrize("combination", NAMES)
def test_the_bits_are_pefts_own(combination, weights, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    config = {"target_modules": ["linear", "conv"], "init_lora_weights": False, "r": 4}
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(lora_alpha=6, **config), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(lora_alpha=3, use_rslora=True, **config))
    model.save_pretrained(tmp_path)
    ties = {"density": 0.35, "majority_sign_method": "frequency"} if combination == "ties" else {}
    model.add_weighted_adapter(["one", "two"], list(weights), "both", combination, **ties)
    ours = {"density": 0.35, "majority": "frequency"} if combination == "ties" else {}
    merged = lt.merge(
        [lt.load(tmp_path / "one"), lt.load(tmp_path / "two")],
        weights=weights,
        method=NAMES[combination],
        **ours,
    )
    assert len(merged.modules) == 2
    for target, module in merged.modules.items():
        layer = model.get_submodule(f"base_model.model.{target.path}")
        assert module.scale == layer.scaling["both"] == 1.0
        assert torch.equal(module.factors["up"].load(), layer.lora_B["both"].weight.detach())
        assert torch.equal(module.factors["down"].load(), layer.lora_A["both"].weight.detach())
