"""Tied embeddings against what PEFT computes, and the tables of names and defaults against transformers' own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import loratools as lt
from loratools.io.base import keys_of
from loratools.ops._tied_names import BIASES, HEADS, INSEPARABLE, PAIRS, TIED, UNTIED
from tests.ops.tied_plans import LLAMA, after, resolved

_CASES: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "ensured": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
    "tokens apart": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]},
    },
}


@pytest.mark.peers
@pytest.mark.parametrize("case", _CASES)
def test_peft_computes_the_same_with_its_adapter(case: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sides = {"vocab_size": 6, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sides, num_attention_heads=2, tie_word_embeddings=True)
    network = transformers.LlamaForCausalLM(config)
    network.save_pretrained(tmp_path / "base")
    before = network.get_input_embeddings().weight.detach().clone()
    tuned = peft.get_peft_model(network, peft.LoraConfig(r=2, init_lora_weights=False, **_CASES[case]))
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if value.requires_grad and "lora_" not in name:
                value.add_(torch.randn_like(value))
    tuned.save_pretrained(str(tmp_path / "adapter"))
    tuned = tuned.eval()
    tokens, hidden = torch.arange(6)[None], torch.eye(4)[None]
    with torch.no_grad():
        embedding, head = tuned.get_input_embeddings()(tokens)[0], tuned.get_output_embeddings()(hidden)[0].T

    base = keys_of(tmp_path / "base")
    base = base._replace(configs={"": {**LLAMA}})
    found = lt.load(tmp_path / "adapter")
    kept = {target: each for target, each in found.modules.items() if "q_proj" not in target.path}
    plan = resolved(base, replace(found, modules=kept))
    assert plan.missing == ((),)
    ours = after(plan, before)
    torch.testing.assert_close(ours[0].float(), embedding, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1].float(), head, rtol=1e-5, atol=1e-6)
    assert bool(plan.added) == (not torch.allclose(embedding, head))


# A class for each row of the table.
_HEADED = (
    *("LlamaForCausalLM", "Qwen2_5_VLForConditionalGeneration", "Idefics3ForConditionalGeneration"),
    *("OPTForCausalLM", "BartForConditionalGeneration", "T5ForConditionalGeneration", "GPT2LMHeadModel"),
    *("BloomForCausalLM", "MambaForCausalLM", "BertForMaskedLM", "RobertaForMaskedLM"),
    *("WhisperForConditionalGeneration", "MoonshineForConditionalGeneration"),
)


@pytest.mark.peers
def test_pairs_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    stated = {
        (source, target)
        for name in _HEADED
        for target, source in getattr(transformers, name)._tied_weights_keys.items()
    }
    # The fourth release named the language model in a multimodal one otherwise.
    ours = {*PAIRS.items()} - {("language_model.model.embed_tokens", "language_model.lm_head")}
    ours |= {("model.decoder.embed_tokens", head) for head in HEADS.values()}
    assert {(f"{source}.weight", f"{target}.weight") for source, target in ours} <= stated
    assert {(source, f"{target}.bias") for target, source in BIASES.items()} <= stated


@pytest.mark.peers
def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    assert all(known[name]().tie_word_embeddings is True for name in TIED)
    assert all(known[name]().tie_word_embeddings is False for name in UNTIED)
    assert {*INSEPARABLE} <= {*known.keys()}
    assert not {*TIED} & {*UNTIED}
