"""Merged and baked adapters of real small models against what PEFT's own modules compute.

The truth is the base with Σ w·ΔW in every tensor, ΔW being what ``merge_and_unload`` of each adapter by itself changes:
PEFT's own combination of adapters is another operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import loratools as lt
from loratools.ops.bake import bake
from loratools.ops.merge import merge_files

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.peers

WEIGHTS = (0.7, 0.4)
TOKENS = torch.tensor([[1, 5, 9, 3, 7], [2, 4, 6, 8, 10]])


def llama(**options: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **options}))


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=32, max_position_embeddings=16)
    return transformers.BertForTokenClassification(config)


def whisper() -> Any:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "vocab_size": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    more = {
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_source_positions": 8,
        "max_target_positions": 8,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **heads, **more, **ends, suppress_tokens=None)
    return transformers.WhisperForConditionalGeneration(config)


MODELS: Mapping[str, tuple[Callable[[], Any], list[str], str]] = {
    "llama": (llama, ["q_proj", "down_proj"], "lm_head"),
    "gpt2": (gpt2, ["c_attn", "mlp.c_proj"], "ln_f"),
    "bert": (bert, ["query", "output.dense"], "classifier"),
    "whisper": (whisper, ["q_proj", "fc1"], "layer_norm"),
}
FEATURES: Mapping[str, Mapping[str, Any]] = {
    "saved": {"modules_to_save": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}
CASES = [(model, feature) for model in MODELS for feature in FEATURES]
CASES += [("llama", "tokens"), ("gpt2", "tokens"), ("bert", "tokens")]
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}


def options_of(model: str, feature: str, number: int) -> dict[str, Any]:
    """What an adapter of a model is made with; the second one differs in rank and rows."""
    made = dict(FEATURES.get(feature, {}))
    if made.get("modules_to_save"):
        made["modules_to_save"] = [MODELS[model][2]]
    if feature == "tokens":
        made["trainable_token_indices"] = {EMBEDDINGS[model]: [[3, 7], [7, 5]][number]}
    return {"r": 2 + number, "lora_alpha": 3, "target_modules": MODELS[model][1], **made}


def based(make: Callable[[], Any], folder: Path) -> Any:
    """A model whose biases are no zeros, saved."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


def loaded(base: Path) -> Any:
    """A fresh copy of the base."""
    config = transformers.AutoConfig.from_pretrained(base)
    return getattr(transformers, config.architectures[0]).from_pretrained(base, dtype=torch.float32).eval()


def trained(base: Path, folder: Path, options: Mapping[str, Any], seed: int) -> None:
    """An adapter without zeros."""
    adapted = peft.get_peft_model(loaded(base), peft.LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        if model.config.model_type == "whisper":
            torch.manual_seed(9)
            return model(input_features=torch.randn(2, 8, 16), decoder_input_ids=TOKENS).logits
        return model(TOKENS).logits


def of_the_sum(base: Path, folders: Sequence[Path], weights: Sequence[float] = WEIGHTS) -> Any:
    """The base with the weighted sum of what PEFT makes of each adapter by itself."""
    model = loaded(base)
    total = {key: value.clone() for key, value in model.state_dict().items()}
    for folder, weight in zip(folders, weights, strict=True):
        single = peft.PeftModel.from_pretrained(loaded(base), folder).merge_and_unload().state_dict()
        for key, before in model.state_dict().items():
            total[key] += weight * (single[key] - before)
    model.load_state_dict(total)
    return model


def assert_close(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> None:
    """Equal to float32's rounding, of what changed."""
    change = float((wanted - base).norm())
    assert change > 1e-3 * float(base.norm())
    assert float((found - wanted).norm()) <= 1e-4 * change


@pytest.mark.parametrize(("model", "feature"), CASES)
def test_a_merge_and_a_bake_are_the_weighted_sum(model: str, feature: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    based(MODELS[model][0], base)
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders):
        trained(base, folder, options_of(model, feature, number), seed=number + 1)
    wanted, before = logits(of_the_sum(base, folders)), logits(loaded(base))

    rank = {"rank": 16} if feature == "dora" else {}
    merge_files(
        folders, tmp_path / "merged", weights=WEIGHTS, base=base, full_modules="sum", dtype="float32", **rank
    )
    with_peft = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "merged").eval()
    assert_close(logits(with_peft), wanted, before)
    bake(base, [lt.load(tmp_path / "merged")], tmp_path / "baked")
    assert_close(logits(loaded(tmp_path / "baked")), wanted, before)
    if feature != "dora":
        # A DoRA's strength lies inside its norm where it is baked, as PEFT has it.
        bake(base, [lt.load(each) for each in folders], tmp_path / "both", weights=WEIGHTS)
        assert_close(logits(loaded(tmp_path / "both")), wanted, before)
