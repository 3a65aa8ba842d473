"""What llama.cpp calls the weights of language models, architecture by architecture, and how it orders their rows.

Names have "#" for the number of a block. The tables are data of our own, so that reading needs no package; a test holds
them against the ones of the ``gguf`` package. Which weights llama.cpp's converter reorders is in its ``conversion``
folder, class by class (``undo_permute``, ``modify_tensors``), since its graphs rotate neighbouring rows where
transformers rotates halves. Architectures whose weights it splits or computes anew (DeepSeek-V2, Mamba) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from loratools.formats._base import HEADS_KV, HEADS_Q, QKV_BY_GROUP, QKV_BY_HEAD

_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_GATED = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_ONE_NORM = {"input_layernorm": "attn_norm"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_SHARED_EXPERT = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_MIXTRAL = {"block_sparse_moe.gate": "ffn_gate_inp"}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# Models whose embeddings are always their output layer, too, which then has no tensor of its own.
_TIED = {path: name for path, name in _TOP.items() if name != "output"}

# What a block of GPT-2 and of GPT-BigCode is made of.
_GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_GPT2_TOP = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
# A block of BLOOM; Falcon's and GPT-NeoX' have the same halves under other names.
_BLOOM = {
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_BLOOM_TOP = {
    "transformer.word_embeddings": "token_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
_T5_ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_o"}
_T5_CROSS = {"q": "cross_attn_q", "k": "cross_attn_k", "v": "cross_attn_v", "o": "cross_attn_o"}
_T5_DENSE = {"wi_0": "ffn_gate", "wi_1": "ffn_up", "wi": "ffn_up", "wo": "ffn_down"}


def _blocks(stem: str, names: Mapping[str, str], goal: str = "blk.#.") -> dict[str, str]:
    return {stem + path: goal + name for path, name in names.items()}


def _decoder(
    *parts: Mapping[str, str], norms: Mapping[str, str] = _NORMS, top: Mapping[str, str] = _TOP
) -> dict[str, str]:
    """A model that spells its names as Llama does, of these parts."""
    found: dict[str, str] = dict(top)
    for part in (norms, *parts):
        found.update(_blocks("model.layers.#.", part))
    return found


class GgufArch(NamedTuple):
    """One of llama.cpp's architectures.

    Attributes:
        name: As ``general.architecture`` says it.
        model_types: The ``model_type`` of configurations that mean it.
        names: llama.cpp's names by transformers'; where two of these mean one, the first is its usual name.
        orders: By the last word of a name of llama.cpp, in which order its rows are; transformers' where absent.
        shifted: Whether its norms are stored with one added.
        turned: The last words of llama.cpp's names of weights that transformers stores as (in, out).
    """

    name: str
    model_types: tuple[str, ...]
    names: Mapping[str, str]
    orders: Mapping[str, str] = {}
    shifted: bool = False
    turned: frozenset[str] = frozenset()


# Queries and keys whose rows are neighbours, as llama.cpp's older graphs rotate them.
_NEIGHBOURS = {"attn_q": HEADS_Q, "attn_k": HEADS_KV}

_LLAMA = _decoder(_ATTENTION, _GATED)
_NO_GATE = {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PHI2 = {
    **{path: name for path, name in _ATTENTION.items() if name != "attn_output"},
    "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_STARCODER2 = {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
_SANDWICH = {**_POST_NORMS, "input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm"}
_GPT_NEOX = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_BERT = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_MPT = {
    "norm_1": "attn_norm",
    "norm_2": "ffn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.out_proj": "attn_output",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}
_T5 = {
    "shared": "token_embd",
    "lm_head": "output",
    **_blocks("encoder.block.#.layer.0.SelfAttention.", _T5_ATTENTION, "enc.blk.#."),
    **_blocks("encoder.block.#.layer.1.DenseReluDense.", _T5_DENSE, "enc.blk.#."),
    **_blocks("decoder.block.#.layer.0.SelfAttention.", _T5_ATTENTION, "dec.blk.#."),
    **_blocks("decoder.block.#.layer.1.EncDecAttention.", _T5_CROSS, "dec.blk.#."),
    **_blocks("decoder.block.#.layer.2.DenseReluDense.", _T5_DENSE, "dec.blk.#."),
}

ARCHES: tuple[GgufArch, ...] = (
    GgufArch(
        "llama",
        ("llama", "mistral", "mixtral"),
        _decoder(_ATTENTION, _GATED, _MIXTRAL, _EXPERTS),
        _NEIGHBOURS,
    ),
    GgufArch("mistral3", ("mistral3", "ministral3"), _LLAMA, _NEIGHBOURS),
    GgufArch("smollm3", ("smollm3",), _LLAMA, _NEIGHBOURS),
    GgufArch("granite", ("granite",), _LLAMA, _NEIGHBOURS),
    GgufArch(
        "olmo",
        ("olmo",),
        {
            "model.embed_tokens": "token_embd",
            "lm_head": "output",
            **_blocks("model.layers.#.", {**_ATTENTION, **_GATED}),
        },
        _NEIGHBOURS,
    ),
    GgufArch("arcee", ("arcee",), _decoder(_ATTENTION, _NO_GATE), _NEIGHBOURS),
    GgufArch("qwen2", ("qwen2",), _LLAMA),
    GgufArch("qwen2moe", ("qwen2_moe",), _decoder(_ATTENTION, _EXPERTS, _SHARED_EXPERT)),
    GgufArch("qwen2vl", ("qwen2_vl", "qwen2_5_vl"), _LLAMA),
    GgufArch("qwen3", ("qwen3",), _decoder(_ATTENTION, _QK_NORMS, _GATED)),
    GgufArch("qwen3moe", ("qwen3_moe",), _decoder(_ATTENTION, _QK_NORMS, _EXPERTS)),
    GgufArch("gemma", ("gemma",), _decoder(_ATTENTION, _GATED, top=_TIED), shifted=True),
    GgufArch("gemma2", ("gemma2",), _decoder(_ATTENTION, _GATED, norms=_SANDWICH, top=_TIED), shifted=True),
    GgufArch(
        "gemma3",
        ("gemma3", "gemma3_text"),
        _decoder(_ATTENTION, _QK_NORMS, _GATED, norms=_SANDWICH),
        shifted=True,
    ),
    GgufArch(
        "phi2",
        ("phi",),
        {
            **_blocks("model.layers.#.", {"input_layernorm": "attn_norm", **_PHI2}),
            "model.embed_tokens": "token_embd",
            "model.final_layernorm": "output_norm",
            "lm_head": "output",
        },
    ),
    GgufArch("phi3", ("phi3",), _decoder(_FUSED)),
    GgufArch("stablelm", ("stablelm",), _LLAMA),
    GgufArch("olmo2", ("olmo2", "olmo3"), _decoder(_ATTENTION, _QK_NORMS, _GATED, norms=_POST_NORMS)),
    GgufArch("olmoe", ("olmoe",), _decoder(_ATTENTION, _QK_NORMS, _EXPERTS)),
    GgufArch(
        "seed_oss",
        ("seed_oss",),
        _decoder(_ATTENTION, _GATED, norms={**_NORMS, "post_attention_layernorm": "post_attention_norm"}),
    ),
    GgufArch(
        "exaone4",
        ("exaone4",),
        _decoder(_ATTENTION, _QK_NORMS, _GATED, norms=_POST_NORMS),
    ),
    GgufArch("command-r", ("cohere",), _decoder(_ATTENTION, _QK_NORMS, _GATED, norms=_ONE_NORM, top=_TIED)),
    GgufArch("cohere2", ("cohere2",), _decoder(_ATTENTION, _GATED, norms=_ONE_NORM, top=_TIED)),
    GgufArch("nemotron", ("nemotron",), _decoder(_ATTENTION, _NO_GATE)),
    GgufArch("starcoder2", ("starcoder2",), _decoder(_ATTENTION, _STARCODER2)),
    GgufArch(
        "gpt2",
        ("gpt2",),
        {**_GPT2_TOP, **_blocks("transformer.h.#.", _GPT2)},
        turned=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
    GgufArch("starcoder", ("gpt_bigcode",), {**_GPT2_TOP, **_blocks("transformer.h.#.", _GPT2)}),
    GgufArch(
        "gptneox",
        ("gpt_neox",),
        {
            **_blocks("gpt_neox.layers.#.", _GPT_NEOX),
            "gpt_neox.embed_in": "token_embd",
            "gpt_neox.final_layer_norm": "output_norm",
            "embed_out": "output",
        },
        {"attn_qkv": QKV_BY_HEAD},
    ),
    GgufArch(
        "falcon",
        ("falcon", "RefinedWebModel", "RefinedWeb"),
        {**_BLOOM_TOP, **_blocks("transformer.h.#.", _BLOOM)},
        {"attn_qkv": QKV_BY_GROUP},
    ),
    GgufArch(
        "bloom",
        ("bloom",),
        {
            **_BLOOM_TOP,
            "transformer.word_embeddings_layernorm": "token_embd_norm",
            **_blocks("transformer.h.#.", {**_BLOOM, "post_attention_layernorm": "ffn_norm"}),
        },
        {"attn_qkv": QKV_BY_HEAD},
    ),
    GgufArch(
        "mpt",
        ("mpt",),
        {
            **_blocks("transformer.blocks.#.", _MPT),
            "transformer.wte": "token_embd",
            "transformer.norm_f": "output_norm",
            "lm_head": "output",
        },
    ),
    GgufArch(
        "bert",
        ("bert", "roberta", "xlm-roberta", "camembert"),
        {
            **_blocks("encoder.layer.#.", _BERT),
            "embeddings.word_embeddings": "token_embd",
            "embeddings.position_embeddings": "position_embd",
            "embeddings.token_type_embeddings": "token_types",
            "embeddings.LayerNorm": "token_embd_norm",
        },
    ),
    GgufArch("t5", ("t5", "mt5", "umt5"), _T5),
)
