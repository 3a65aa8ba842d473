"""``loratools convert --experts``: what a user types for adapters of experts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import loratools as lt
from tests.cli.running import invoke


def adapter(folder: Path) -> Path:
    folder.mkdir()
    stem = "base_model.model.model.layers.0.mlp.experts"
    tensors = {}
    for key, out, width in ((f"{stem}.base_layer", 8, 6), (stem, 6, 4)):
        tensors[f"{key}.lora_A.weight"] = torch.randn(6, width)
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, 6)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "base_model_name_or_path": "mistralai/Mixtral-8x7B-v0.1",
        "target_parameters": ["gate_up_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def test_the_number_of_experts_can_be_said(tmp_path: Path) -> None:
    given, out = adapter(tmp_path / "given"), tmp_path / "out"
    refused = invoke("convert", given, "-o", out, "--to", "peft", "--experts", "split")
    assert refused.exit_code == 1
    assert "--experts-count" in refused.stderr
    assert not out.exists()
    done = invoke(
        "convert", given, "-o", out, "--to", "peft", "--experts", "split", "--experts-count", 3, "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["kinds"] == {"lora": 9}
    assert len(lt.load(out).modules) == 9


def test_info_names_the_parameters(tmp_path: Path) -> None:
    given = adapter(tmp_path / "given")
    (config := given / "adapter_config.json").write_text(config.read_text().replace('"r": 4', '"r": 2'))
    shown = json.loads(invoke("info", given, "--json").stdout)
    found = sorted((module["shape"], module["rank"]) for module in shown["modules"])
    assert found == [([3, 6, 4], 2), ([3, 8, 6], 2)]
    assert all(module["norm"] > 0 for module in shown["modules"])
