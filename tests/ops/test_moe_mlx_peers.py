"""Experts in mlx-lm's own models: the adapter that we write changes their outputs as the baked model's differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.ops.convert import convert_file

pytestmark = pytest.mark.peers
mlx = pytest.importorskip("mlx.core")
utils = pytest.importorskip("mlx_lm.utils")

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}


def checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    shapes = {"model.embed_tokens": (32, 16), "lm_head": (32, 16), "model.norm": (16,)}
    for layer in range(2):
        block = f"model.layers.{layer}."
        shapes |= {f"{block}{name}_layernorm": (16,) for name in ("input", "post_attention")}
        shapes |= {f"{block}self_attn.{name}_proj": (16 if name == "q" else 8, 16) for name in "qkv"}
        shapes |= {f"{block}self_attn.o_proj": (16, 16), f"{block}mlp.gate": (4, 16)}
        shapes |= {f"{block}self_attn.{name}_norm": (8,) for name in "qk"}
        for expert in range(4):
            own = f"{block}mlp.experts.{expert}."
            shapes |= {f"{own}gate_proj": (12, 16), f"{own}up_proj": (12, 16), f"{own}down_proj": (16, 12)}
    folder.mkdir()
    tensors = {f"{key}.weight": torch.randn(shape) * 0.4 for key, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def adapter(folder: Path) -> Path:
    torch.manual_seed(1)
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, out, width in (("gate", 12, 16), ("up", 12, 16), ("down", 16, 12)):
                stem = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}_proj"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(2, width) * 0.3
                tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 2) * 0.3
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def outputs(folder: Path, adapters: Path | None = None) -> torch.Tensor:
    model, _ = utils.load_model(folder)
    if adapters is not None:
        model = utils.load_adapters(model, str(adapters))
    model.eval()
    return torch.tensor(model(mlx.array([[1, 5, 9, 2, 7, 3]])).tolist())


def test_mlx_runs_what_was_stacked(tmp_path: Path) -> None:
    base, given = checkpoint(tmp_path / "base"), adapter(tmp_path / "given")
    convert_file(given, tmp_path / "mlx", to="mlx", base=base)
    shapes = {tuple(ref.shape) for ref in load_file(tmp_path / "mlx" / "adapters.safetensors").values()}
    assert shapes == {(4, 2, 16), (4, 2, 12), (4, 12, 2), (4, 16, 2)}
    lt.bake(base, [given], tmp_path / "baked")
    wanted = outputs(tmp_path / "baked")
    assert (wanted - outputs(base)).abs().max() > 0.1
    torch.testing.assert_close(outputs(base, tmp_path / "mlx"), wanted, rtol=1e-3, atol=1e-3)
