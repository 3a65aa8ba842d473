"""What is extracted, PEFT and diffusers load whole, and make the tuned model of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusers as tiny
import torch
from safetensors.torch import load_file, save_file

from loratools.ops.extract import extract
from tests.ops import checkpoints as make

pytestmark = pytest.mark.peers

_TEXT = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
# Their class, its configuration's, and the sizes: with tied heads, biases in some layers or in all, GPT-2's layers
# stored as (in, out), convolutions, and several embeddings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**_TEXT, "num_hidden_layers": 1, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **{"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40},
            **{"bos_token_id": 1, "eos_token_id": 2},
        },
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", {**_TEXT, "num_hidden_layers": 1}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **{"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48},
            **{"decoder_ffn_dim": 48, "max_source_positions": 30, "max_target_positions": 20},
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        },
    ),
}


@torch.no_grad()
def tune(model: torch.nn.Module, *, small: bool) -> None:
    """Add a product of rank 2 to every matrix, and on request noise to every vector."""
    for at, (_, value) in enumerate(model.named_parameters()):
        if value.dim() > 1:
            value += make.low_rank(tuple(value.shape), 2, at)
        elif small:
            value += make.random(tuple(value.shape), at, 0.1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("whole", [False, True])
def test_peft_makes_the_tuned_model_of_it(name: str, whole: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    cls, config, sizes = MODELS[name]
    base, tuned, output = (tmp_path / word for word in ("base", "tuned", "out"))
    make_one = getattr(transformers, cls)
    make_one(getattr(transformers, config)(**sizes)).save_pretrained(base)
    wanted = make_one.from_pretrained(base)
    tune(wanted, small=whole)
    wanted.save_pretrained(tuned)
    _, report = extract(base, tuned, output, rank=2, dtype="float32", embeddings=whole, full_small=whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(make_one.from_pretrained(base), output).merge_and_unload()
    left = {each.key for each in report.left_out}
    assert bool(left) is not whole
    pointers = {value.data_ptr() for key, value in wanted.state_dict().items() if key in left}
    state = merged.state_dict()
    for key, value in wanted.state_dict().items():
        # A tied head is under the embedding's name alone in the file.
        if value.data_ptr() not in pointers:
            assert torch.allclose(state[key], value, atol=1e-5), key


@pytest.mark.parametrize(
    ("arch", "layout"), [("sd15", "kohya"), ("sdxl", "diffusers"), ("flux", "diffusers")]
)
def test_diffusers_fuses_the_tuned_model(arch: str, layout: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.loaders import lora_pipeline

    case = tiny.CASES[arch]
    models = case.models()
    for word in ("base", "tuned"):
        for name, model in models.items():
            (tmp_path / word / name).mkdir(parents=True)
            values = {key: value.contiguous() for key, value in model.state_dict().items()}
            if word == "tuned":
                adapted = {f"{path}.weight" for path in tiny.adaptable(model)}
                values = make.tuned(
                    {key: value for key, value in values.items() if key in adapted}, 2, only=""
                )
                values = {**model.state_dict(), **values}
            save_file(
                {key: value.contiguous() for key, value in values.items()},
                tmp_path / word / name / "model.safetensors",
            )
        (tmp_path / word / "model_index.json").write_text("{}")
    output = tmp_path / "lora.safetensors"
    asked = {"rank": 2, "dtype": "float32", "arch": arch}
    _, report = extract(tmp_path / "base", tmp_path / "tuned", output, to=layout, **asked)
    assert report.error < 1e-5
    mixin = getattr(lora_pipeline, case.mixin)
    pipeline = type("Pipeline", (mixin,), {"hf_device_map": None, "components": models, **models})()
    pipeline.load_lora_weights(str(output))
    pipeline.fuse_lora(components=list(models))
    pipeline.unload_lora_weights()
    for name, model in models.items():
        wanted = load_file(tmp_path / "tuned" / name / "model.safetensors")
        for key, value in model.state_dict().items():
            assert torch.allclose(value, wanted[key], atol=1e-4), (name, key)
