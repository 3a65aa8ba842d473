"""Tensors that PEFT's methods share: whose they are, what they tell of shapes, and how often they are written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools import formats
from loratools.errors import LayoutError
from loratools.ops import convert

STEM = "base_model.model.model.layers.0.self_attn."


def vera(folder: Path, outputs: dict[str, int], width: int, height: int, **config: Any) -> Path:
    """A VeRA of modules with so many outputs each, around projections (2, width) and (height, 2)."""
    tensors = {}
    for number, (name, length) in enumerate(outputs.items()):
        tensors[f"{STEM}{name}.vera_lambda_b"] = torch.full((length,), 1.0 + number)
        tensors[f"{STEM}{name}.vera_lambda_d"] = torch.ones(2)
    if width:
        tensors["base_model.vera_A"], tensors["base_model.vera_B"] = (
            torch.ones(2, width),
            torch.ones(height, 2),
        )
    return written(folder, tensors, {"peft_type": "VERA", "r": 2, "save_projection": bool(width), **config})


def written(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("outputs", "width", "height", "said"),
    [
        ({"q_proj": 8, "o_proj": 8}, 8, 8, "inputs=8"),
        ({"q_proj": 8, "o_proj": 8}, 12, 8, ""),
        ({"q_proj": 8, "k_proj": 4}, 8, 8, ""),
        ({"gate_proj": 12}, 8, 12, "inputs=8"),
    ],
    ids=["square", "wider than high", "several heights", "one name"],
)
def test_how_many_inputs_the_file_tells(
    outputs: dict[str, int], width: int, height: int, said: str, tmp_path: Path
) -> None:
    adapter = lt.load(vera(tmp_path / "a", outputs, width, height))
    assert {module.variant for module in adapter.modules.values()} == {said}
    assert len(adapter.notes) == 1
    assert ("--base" in adapter.notes[0]) is not said.startswith("inputs")
    for module in adapter.modules.values():
        if said:
            assert tuple(module.delta().shape) == (module.factors["vera_lambda_b"].numel, width)


def test_projections_that_are_not_stored_leave_their_seed(tmp_path: Path) -> None:
    adapter = lt.load(vera(tmp_path / "a", {"q_proj": 8}, 0, 0, projection_prng_key=5))
    (module,) = adapter.modules.values()
    assert module.variant == "key=5"
    assert "vera_a" not in module.factors


def test_what_is_shared_is_written_once_and_counted_once(tmp_path: Path) -> None:
    source = vera(tmp_path / "a", {"q_proj": 8, "o_proj": 8}, 8, 8)
    converted = convert.convert(lt.load(source), "peft")
    names = [ref.name for ref in converted.document.tensors]
    assert sorted(names) == sorted(load_file(source / "adapter_model.safetensors"))
    shared = [entry for entry in converted.ledger if entry.key == "base_model.vera_A"]
    assert [entry.into for entry in shared] == [("base_model.vera_A",)]


def test_shared_tensors_without_a_prefix_are_found(tmp_path: Path) -> None:
    tensors = load_file(vera(tmp_path / "a", {"q_proj": 8}, 8, 8) / "adapter_model.safetensors")
    bare = {key.removeprefix("base_model.").removeprefix("model."): value for key, value in tensors.items()}
    adapter = lt.load(written(tmp_path / "b", bare, {"peft_type": "VERA", "r": 2}))
    assert not adapter.extras
    assert adapter.kinds == {"vera": 1}
    assert all("vera_a" in module.factors for module in adapter.modules.values())


def test_shared_names_of_different_data_are_refused(tmp_path: Path) -> None:
    one, other = (vera(tmp_path / name, {"q_proj": 8, "o_proj": 8}, 8, 8) for name in "ab")
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({**tensors, "base_model.vera_A": torch.zeros(2, 8)}, other / "adapter_model.safetensors")
    first, second = lt.load(one), lt.load(other)
    (a, one_module), (b, _) = first.modules.items()
    both = {a: one_module, b: second.modules[b]}
    mixed = lt.Adapter(both, config=first.config, layout=first.layout, arch=first.arch)
    with pytest.raises(LayoutError, match="under one key"):
        formats.document(mixed, mixed.layout, formats.get("peft"))


@pytest.mark.parametrize("more", ["magnitude", "diff_b"])
def test_what_pefts_methods_have_no_place_for_is_refused(more: str, tmp_path: Path) -> None:
    adapter = lt.load(vera(tmp_path / "a", {"q_proj": 8}, 8, 8))
    (module,) = adapter.modules.values()
    beside = module.factors["vera_lambda_b"].renamed("beside")
    if more == "magnitude":
        module = module._replace(magnitude=beside, magnitude_axis="out")
    else:
        module = module._replace(factors={**module.factors, more: beside})
    changed = replace(adapter, modules={module.target: module}, order=())
    with pytest.raises(LayoutError, match="vera"):
        formats.document(changed, adapter.layout, formats.get("peft"))


def test_shared_tensors_that_nobody_uses_are_extras(tmp_path: Path) -> None:
    stem = STEM + "q_proj."
    tensors = {
        f"{stem}lora_A.weight": torch.ones(2, 8),
        f"{stem}lora_B.weight": torch.ones(8, 2),
        "base_model.vblora_vector_bank": torch.ones(3, 4),
    }
    adapter = lt.load(written(tmp_path / "a", tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    assert adapter.kinds == {"lora": 1}
    assert adapter.extras.keys() == {"base_model.vblora_vector_bank"}
