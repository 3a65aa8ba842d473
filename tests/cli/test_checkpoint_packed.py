"""Checkpoints whose weights are packed: named with their scheme and refused, never skipped."""

import pytest
import torch

from tests.cli import checkpoint_files as make
from tests.cli.checkpoint_files import refused


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Files are named as a user types them."""
    monkeypatch.chdir(tmp_path)


def _packed(scheme):
    """A language model whose layers are packed."""
    found = {}
    for key, weight in make.llama().items():
        stem = key.removesuffix(".weight")
        if "embed" in key:
            found[key] = weight
        elif scheme == "bitsandbytes NF4":
            found[key] = torch.zeros(32, 1, dtype=torch.uint8)
            found[f"{key}.absmax"], found[f"{key}.quant_map"] = torch.zeros(1), torch.zeros(16)
            found[f"{key}.quant_state.bitsandbytes__nf4"] = torch.zeros(10, dtype=torch.uint8)
        else:
            found[f"{stem}.qweight"] = torch.zeros(8, 1, dtype=torch.int32)
            found[f"{stem}.qzeros"] = torch.zeros(1, 1, dtype=torch.int32)
            found[f"{stem}.scales"] = torch.zeros(1, 8)
            if scheme == "GPTQ":
                found[f"{stem}.g_idx"] = torch.zeros(8, dtype=torch.int32)
    return found


@pytest.mark.parametrize("scheme", ["bitsandbytes NF4", "GPTQ", "AWQ"])
def test_weights_that_are_packed_are_named_with_their_scheme(tmp_path, scheme):
    base = make.llama()
    changed = {key: weight + 0.1 * weight[:, :1] @ weight[:1] for key, weight in base.items()}
    make.state(tmp_path / "full.safetensors", base)
    make.state(tmp_path / "tuned.safetensors", changed)
    (tmp_path / "packed").mkdir()
    make.state(tmp_path / "packed" / "model.safetensors", _packed(scheme))
    if scheme == "AWQ":
        (tmp_path / "packed" / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert (
        make.invoke("extract", "full.safetensors", "tuned.safetensors", "-o", "lora", "--rank", "2").exit_code
        == 0
    )
    for command in (
        ("bake", "packed", "lora", "-o", "out"),
        ("extract", "full.safetensors", "packed", "-o", "out"),
        ("extract", "packed", "tuned.safetensors", "-o", "out"),
        ("verify", "packed", "lora", "tuned.safetensors"),
    ):
        found = refused(tmp_path, *command)
        assert found.startswith("Error: packed: 14 weights ")
        assert scheme in found
        assert "model.layers.0.self_attn" in found or "model.layers.0.mlp" in found
        assert "quantise" in found
