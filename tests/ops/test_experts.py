"""PEFT's target_parameters: which parameter a module is for, how its factors are packed, and with which scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loratools as lt
from loratools import kinds
from loratools.errors import NameResolutionError, ShapeError
from loratools.io.base import Base, Weight, keys_of
from loratools.io.reader import open_tensors
from loratools.model import Adapter, Layout, Module, Target
from loratools.ops._experts import TURNED, fitted, parameter_of
from loratools.tensors import from_torch

OWNER = "model.layers.0.mlp.experts"
Shape = tuple[int, ...]


def part(**shapes: Shape) -> dict[str, Weight]:
    found = {f"{OWNER}.{name}": shape for name, shape in shapes.items()}
    return {key: Weight(key, shape, "F32", "base.safetensors") for key, shape in sorted(found.items())}


def adapter(levels: list[tuple[Shape, Shape]], targets: list[str], **config: Any) -> Adapter:
    """An adapter of nested wrappers, the outermost first; up and down of each."""
    modules = {}
    for depth, (up, down) in enumerate(levels):
        target = Target("language_model", OWNER + ".base_layer" * depth)
        torch.manual_seed(depth)
        factors = {"up": from_torch("up", torch.randn(up)), "down": from_torch("down", torch.randn(down))}
        modules[target] = Module(target, "experts", factors)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_parameters": targets, **config}
    return Adapter(
        modules, layout=Layout("peft"), config={key: value for key, value in said.items() if value}
    )


def meant(found: Adapter, base: dict[str, Weight]) -> list[str]:
    keys = [parameter_of(found, module, base) for module in found.modules.values()]
    return [key.rpartition(".")[2] if key else "" for key in keys]


SQUARE = ((4, 6), (6, 4))


def test_mixtral_becomes_what_peft_merges(shared: Path) -> None:
    case = shared / "oracle" / "peft_bake__mixtral_target_parameters"
    loaded, base = lt.load(case / "input" / "adapter"), keys_of(case / "input" / "base")
    config = json.loads((case / "input" / "base" / "config.json").read_text())
    changed = []
    with (
        open_tensors(case / "input" / "base" / "model.safetensors") as before,
        open_tensors(case / "expected" / "merged.safetensors") as merged,
    ):
        for module in loaded.modules.values():
            if module.kind != "experts":
                continue
            key = parameter_of(loaded, module, base.parts[""])
            assert key is not None
            found = fitted(loaded, module, base.parts[""][key], base.parts[""], config)
            assert (found.scale, found.rank, found.alpha) == (3.0, 2, 6.0)
            baked = before.tensors[key].load() + kinds.delta(found)
            torch.testing.assert_close(baked, merged.tensors[key].load(), rtol=1e-5, atol=1e-6)
            changed.append(key.rpartition(".")[2])
    assert sorted(changed) == ["down_proj", "gate_up_proj"]


def test_shapes_decide_whatever_the_order() -> None:
    base = part(gate_up_proj=(3, 8, 4), down_proj=(3, 4, 5))
    gate_up, down = ((8, 6), (6, 4)), ((4, 6), (6, 5))
    listed = ["experts.down_proj", "experts.gate_up_proj"]
    assert meant(adapter([down, gate_up], listed), base) == ["down_proj", "gate_up_proj"]
    assert meant(adapter([gate_up, down], listed), base) == ["gate_up_proj", "down_proj"]


def test_the_last_registered_is_outermost_where_shapes_are_alike() -> None:
    base = part(gate_up_proj=(3, 4, 4), down_proj=(3, 4, 4), other=(3, 4, 4))
    listed = ["experts.other", "experts.down_proj", "experts.gate_up_proj"]
    found = adapter([SQUARE, SQUARE, SQUARE], listed)
    assert meant(found, base) == ["other", "down_proj", "gate_up_proj"]
    unknown = part(w1=(3, 4, 4), a2=(3, 4, 4))
    assert meant(adapter([SQUARE, SQUARE], ["experts.w1", "experts.a2"]), unknown) == ["a2", "w1"]


def test_only_targeted_parameters_count_and_other_wrappers_are_seen_through() -> None:
    base = part(gate_up_proj=(3, 4, 4), down_proj=(3, 4, 4))
    assert meant(adapter([SQUARE], ["experts.down_proj"]), base) == ["down_proj"]
    moved = {key.replace("model.", "model.language_model.", 1): weight for key, weight in base.items()}
    found = adapter([SQUARE], ["experts.down_proj"])
    (module,) = found.modules.values()
    assert parameter_of(found, module, moved) == f"model.language_model.{OWNER[6:]}.down_proj"
    assert meant(adapter([SQUARE], ["router.weight"]), base) == [""]
    assert meant(adapter([((9, 6), (6, 4))], ["experts.down_proj"]), base) == [""]


def test_stacked_experts_without_a_configuration_go_by_their_shapes() -> None:
    stacked = [((3, 8, 2), (3, 2, 4))]
    assert meant(adapter(stacked, []), part(weight=(3, 8, 4))) == ["weight"]
    assert meant(adapter(stacked, []), part(gate_up_proj=(3, 8, 4), down_proj=(3, 4, 5))) == ["gate_up_proj"]
    with pytest.raises(NameResolutionError, match=r"gate_proj or .*up_proj"):
        meant(adapter(stacked, []), part(gate_proj=(3, 8, 4), up_proj=(3, 8, 4)))


def turned(base: dict[str, Weight], found: Adapter, config: dict[str, Any] | None = None) -> dict[str, bool]:
    answers = {}
    for module in found.modules.values():
        key = parameter_of(found, module, base)
        assert key is not None
        answers[key.rpartition(".")[2]] = fitted(found, module, base[key], base, config).in_first
    return answers


def test_square_experts_are_turned_where_their_sibling_or_the_model_type_says_so() -> None:
    listed = ["experts.gate_up_proj", "experts.down_proj"]
    both = adapter([SQUARE, ((8, 6), (6, 4))], listed)
    straight = part(gate_up_proj=(3, 8, 4), down_proj=(3, 4, 4))
    assert turned(straight, both) == {"gate_up_proj": False, "down_proj": False}
    assert turned(part(gate_up_proj=(3, 4, 8), down_proj=(3, 4, 4)), both) == {
        "gate_up_proj": True,
        "down_proj": True,
    }
    alone = adapter([SQUARE], ["experts.down_proj"])
    assert turned(straight, alone) == {"down_proj": False}
    assert turned(straight, alone, {"model_type": "gpt_oss"}) == {"down_proj": True}
    assert turned(part(down_proj=(3, 4, 4), down_proj_bias=(3, 4)), alone) == {"down_proj": True}


def test_a_matrix_is_plain_lora_with_its_own_scale() -> None:
    found = adapter([((8, 2), (2, 4))], ["experts.weight"], use_rslora=True)
    (module,) = found.modules.values()
    plain = fitted(found, module, part(weight=(8, 4))[f"{OWNER}.weight"], part(weight=(8, 4)))
    assert (plain.kind, plain.rank, plain.scale) == ("lora", 2, 6 / 2**0.5)
    product = module.factors["up"].load() @ module.factors["down"].load() * plain.scale
    torch.testing.assert_close(kinds.delta(plain), product)


def test_patterns_are_matched_against_the_parameter() -> None:
    found = adapter([((8, 12), (12, 4))], ["experts.down_proj"], alpha_pattern={r".*\.down_proj": 20})
    (module,) = found.modules.values()
    base = part(down_proj=(3, 8, 4))
    assert fitted(found, module, base[f"{OWNER}.down_proj"], base).scale == 5.0


def test_factors_of_other_sides_are_refused() -> None:
    found = adapter([((8, 7), (7, 4))], ["experts.down_proj"])
    (module,) = found.modules.values()
    base = part(down_proj=(3, 8, 4))
    with pytest.raises(ShapeError, match=r"up is \[8, 7\] and down \[7, 4\]"):
        fitted(found, module, base[f"{OWNER}.down_proj"], base)


class _Experts(nn.Module):
    def __init__(self, shapes: dict[str, Shape], is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))


class _Network(nn.Module):
    def __init__(self, shapes: dict[str, Shape], is_transposed: bool) -> None:
        super().__init__()
        self.experts = _Experts(shapes, is_transposed)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("shapes", "is_transposed"),
    [
        ({"gate_up_proj": (3, 8, 4), "down_proj": (3, 4, 5)}, False),
        ({"gate_up_proj": (3, 4, 8), "down_proj": (3, 4, 4)}, True),
        ({"gate_up_proj": (3, 4, 4), "down_proj": (3, 4, 4)}, False),
        ({"z": (3, 4, 4), "a": (3, 4, 6), "b": (3, 6, 4)}, False),
        ({"weight": (6, 4)}, False),
    ],
)
def test_peft_merges_the_same(shapes: dict[str, Shape], is_transposed: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    network = _Network(shapes, is_transposed)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    # Listed in another order than registered, which PEFT does not go by.
    names = [f"experts.{name}" for name in reversed(shapes)]
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=[], target_parameters=names, init_lora_weights=False
    )
    model = peft.get_peft_model(network, config)
    model.save_pretrained(str(tmp_path))
    loaded = lt.load(tmp_path)
    base = {name: Weight(name, tuple(value.shape), "F32", "base") for name, value in before.items()}
    told = {"model_type": "gpt_oss"} if is_transposed else {"model_type": "mixtral"}
    merged = model.merge_and_unload().state_dict()
    for module in loaded.modules.values():
        key = parameter_of(loaded, module, base)
        assert key is not None
        delta = kinds.delta(fitted(loaded, module, base[key], base, told))
        torch.testing.assert_close(before.pop(key) + delta, merged[key], rtol=1e-5, atol=1e-6)
    assert not before


@pytest.mark.peers
def test_model_types_with_turned_experts_are_those_that_say_so() -> None:
    transformers = pytest.importorskip("transformers")
    folder = Path(transformers.__file__).parent / "models"
    found = {
        file.parent.name
        for file in folder.glob("*/modeling_*.py")
        if "is_transposed=True" in file.read_text(encoding="utf-8")
    }
    assert {name.removesuffix("_text") for name in TURNED} == found


def test_a_base_without_the_owner_has_no_place() -> None:
    found = adapter([SQUARE], ["experts.down_proj"])
    (module,) = found.modules.values()
    assert parameter_of(found, module, Base("base", {"": {}}).parts[""]) is None
