"""llama.cpp with our GGUF adapters: the logits of PEFT with the adapters that they were made from."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratools.ops import convert

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers

TOKENS = (3, 17, 5, 40, 8, 22)
# llama.cpp computes some products of a CPU in lower precision; an adapter changes logits by far more.
TOLERANCE = 2e-3
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GPT2 = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}


def _interleaved(weight: Any, heads: int) -> Any:
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _written(path: Path, name: str, config: Any, tensors: dict[str, Any]) -> Path:
    """A model file of llama.cpp's without a vocabulary."""
    writer = gguf.GGUFWriter(path, name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_layer_norm_eps(getattr(config, "layer_norm_epsilon", 1e-5))
    writer.add_tokenizer_model("no_vocab")
    for key, tensor in tensors.items():
        writer.add_tensor(key, np.ascontiguousarray(tensor.detach().float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _llama(folder: Path) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    model.config.save_pretrained(folder)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    state = model.state_dict()
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for number in range(LLAMA["num_hidden_layers"]):
        for theirs, own in names.items():
            weight = state[f"model.layers.{number}.{theirs}.weight"]
            heads = {"attn_q": LLAMA["num_attention_heads"], "attn_k": LLAMA["num_key_value_heads"]}.get(own)
            tensors[f"blk.{number}.{own}.weight"] = _interleaved(weight, heads) if heads else weight
    return model, _written(folder / "model.gguf", "llama", model.config, tensors)


def _gpt2(folder: Path) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    model.config.save_pretrained(folder)
    names = {
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    state = {key.removeprefix("transformer."): tensor for key, tensor in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["wte.weight"],
        "position_embd.weight": state["wpe.weight"],
        "output_norm.weight": state["ln_f.weight"],
        "output_norm.bias": state["ln_f.bias"],
    }
    for number in range(GPT2["n_layer"]):
        for theirs, own in names.items():
            weight = state[f"h.{number}.{theirs}.weight"]
            tensors[f"blk.{number}.{own}.weight"] = weight.T if weight.ndim == 2 else weight
            tensors[f"blk.{number}.{own}.bias"] = state[f"h.{number}.{theirs}.bias"]
    return model, _written(folder / "model.gguf", "gpt2", model.config, tensors)


def _adapted(model: Any, folder: Path, **options: Any) -> Any:
    torch.manual_seed(1)
    found = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options)).eval()
    found.save_pretrained(folder)
    return found


def _of_llama_cpp(model: Path, adapter: Path | None) -> np.ndarray:
    """The logits of every token."""
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    loaded = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
    assert loaded is not None
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 64
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(loaded, params)
    batch = llama_cpp.llama_batch_init(len(TOKENS), 0, 1)
    try:
        if adapter is not None:
            lora = llama_cpp.llama_adapter_lora_init(loaded, str(adapter).encode())
            assert lora, "llama.cpp refuses the adapter"
            held = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora)
            assert llama_cpp.llama_set_adapters_lora(context, held, 1, (ctypes.c_float * 1)(1.0)) == 0
        batch.n_tokens = len(TOKENS)
        for place, token in enumerate(TOKENS):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, True
        assert llama_cpp.llama_decode(context, batch) == 0
        size = len(TOKENS) * llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
        logits = llama_cpp.llama_get_logits(context)
        return np.ctypeslib.as_array(logits, (size,)).reshape(len(TOKENS), -1).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(loaded)


def _of_transformers(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0].float().numpy()


_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (_llama, {"r": 4, "lora_alpha": 8, "target_modules": _ALL}),
    "rslora with patterns": (
        _llama,
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "down_proj": 3},
            "alpha_pattern": {"k_proj": 5, "up_proj": 12},
            "target_modules": _ALL,
        },
    ),
    "embeddings": (
        _llama,
        {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    ),
    "gpt2": (
        _gpt2,
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case: str, tmp_path: Path) -> None:
    build, options = CASES[case]
    model, file = build(tmp_path)
    plain = _of_transformers(model)
    np.testing.assert_allclose(_of_llama_cpp(file, None), plain, atol=TOLERANCE)
    wanted = _of_transformers(_adapted(model, tmp_path / "adapter", **options))
    convert.convert_file(
        tmp_path / "adapter",
        tmp_path / "adapter.gguf",
        to="gguf",
        base=tmp_path / "config.json",
        drop=("extras",) if case == "embeddings" else (),
    )
    assert np.abs(wanted - plain).max() > 50 * TOLERANCE
    np.testing.assert_allclose(_of_llama_cpp(file, tmp_path / "adapter.gguf"), wanted, atol=TOLERANCE)
