"""Language models: decoders, encoders, encoder-decoders; their paths are their own names in every layout."""

from __future__ import annotations

from loratools.archs._arch import Arch
from loratools.archs._table import Component

ARCH = Arch(
    name="llm",
    title="language model",
    components=(Component("language_model", {"peft": ("base_model.model.",)}),),
    markers=(
        "layers.#.self_attn",  # Llama, Mistral, Qwen, Gemma, Phi, DeepSeek, Mixtral, BART, OPT
        "layers.#.mlp",
        "layers.#.linear_attn",  # Qwen3-Next
        "layers.#.mamba",
        "layers.#.mixer",
        "layers.#.block_sparse_moe",  # Mixtral
        "layers.#.feed_forward.experts",  # Llama 4, Jamba, LFM2
        "layers.#.fc1",  # OPT, BART
        "layers.#.fc2",
        "decoder.layers.#.encoder_attn",  # BART
        "transformer.h.#",  # GPT-2, GPT-Neo, GPT-J, Bloom, Falcon
        "h.#.attn",
        "h.#.mlp",
        "transformer.blocks.#",  # MPT
        "transformer.layer.#",  # DistilBERT
        "transformer.encoder.layers.#",  # ChatGLM
        "gpt_neox.layers.#",
        "encoder.layer.#",  # BERT, RoBERTa, DeBERTa, ESM-2
        "encoder.block.#",  # T5
        "decoder.block.#",
        "attention.wqkv",  # InternLM 2
        "lm_head",
    ),
)
