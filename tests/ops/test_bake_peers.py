"""A baked model loaded by transformers against the adapter applied by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.ops.bake import bake

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.peers

TOKENS = torch.arange(24).reshape(2, 12) % 64


def _llama(folder: Path, **options: Any) -> Any:
    """A tiny Llama, saved in several shards."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        **options,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="15KB")
    return model


def _adapted(model: Any, folder: Path, **options: Any) -> Any:
    """The model with an adapter whose factors are not zero, which is saved."""
    config = peft.LoraConfig(r=4, lora_alpha=8, **options)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return adapted


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(TOKENS).logits.float()
    return logits


def _loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("dora", [False, True])
def test_logits_of_a_sharded_model(tmp_path: Path, dora: bool) -> None:
    model = _llama(tmp_path / "base", tie_word_embeddings=False)
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 2
    adapted = _adapted(model, tmp_path / "adapter", target_modules="all-linear", use_dora=dora)
    wanted, plain = _logits(adapted), _logits(_loaded(tmp_path / "base"))

    bake(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "baked")

    found = _logits(_loaded(tmp_path / "baked"))
    # Weights that are rounded once to 8 bits, and activations that are rounded at every layer.
    assert float((found - wanted).norm()) < 0.03 * float(wanted.norm())
    assert float((found - wanted).norm()) < 0.2 * float((plain - wanted).norm())
    names = sorted(file.name for file in (tmp_path / "base").iterdir())
    assert sorted(file.name for file in (tmp_path / "baked").iterdir()) == names
    assert json.loads((tmp_path / "baked" / "config.json").read_text())["model_type"] == "llama"


def test_an_embedding_that_was_tied(tmp_path: Path) -> None:
    model = _llama(tmp_path / "base", tie_word_embeddings=True)
    adapted = _adapted(model, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    wanted = _logits(adapted)

    report = bake(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "baked")

    config = json.loads((tmp_path / "baked" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert any("tied" in note for note in report.notes)
    found = _logits(_loaded(tmp_path / "baked"))
    assert float((found - wanted).norm()) < 0.03 * float(wanted.norm())


def test_modules_that_were_trained_whole(tmp_path: Path) -> None:
    model = _llama(tmp_path / "base", tie_word_embeddings=False)
    adapted = _adapted(
        model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "norm"]
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = _logits(adapted)

    bake(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "baked")

    found = _logits(_loaded(tmp_path / "baked"))
    assert float((found - wanted).norm()) < 0.03 * float(wanted.norm())
