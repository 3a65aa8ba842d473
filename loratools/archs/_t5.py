"""The T5 encoder (version 1.1: gated feed-forward), in Hugging Face's names, which every file uses."""

from __future__ import annotations

from loratools.archs._table import Table, same

T5_ENCODER = Table(
    same(
        "shared",
        "encoder.embed_tokens",
        "encoder.block.{}.layer.0.SelfAttention.q",
        "encoder.block.{}.layer.0.SelfAttention.k",
        "encoder.block.{}.layer.0.SelfAttention.v",
        "encoder.block.{}.layer.0.SelfAttention.o",
        "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
        "encoder.block.{}.layer.0.layer_norm",
        "encoder.block.{}.layer.1.DenseReluDense.wi_0",
        "encoder.block.{}.layer.1.DenseReluDense.wi_1",
        "encoder.block.{}.layer.1.DenseReluDense.wo",
        "encoder.block.{}.layer.1.layer_norm",
        "encoder.final_layer_norm",
    )
)
