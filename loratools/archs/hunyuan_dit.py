"""Hunyuan-DiT 1.x: blocks with cross-attention and, in the second half, long skips; a BERT and an mT5 encode text.

The checkpoint and diffusers exchange two names: the norm before the cross-attention is ``norm3`` in the
checkpoint and ``norm2`` in diffusers, the norm before the MLP the other way round.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._table import DIFFUSERS, NATIVE, Component, Row, Table, same, swapped

_ROWS: tuple[Row, ...] = (
    ("text_embedding_padding", None),
    ("mlp_t5.0", "text_embedder.linear_1"),
    ("mlp_t5.2", "text_embedder.linear_2"),
    ("x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.mlp.0", "time_extra_emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_extra_emb.timestep_embedder.linear_2"),
    ("pooler.positional_embedding", "time_extra_emb.pooler.positional_embedding"),
    ("pooler.q_proj", "time_extra_emb.pooler.q_proj"),
    ("pooler.k_proj", "time_extra_emb.pooler.k_proj"),
    ("pooler.v_proj", "time_extra_emb.pooler.v_proj"),
    ("pooler.c_proj", "time_extra_emb.pooler.c_proj"),
    ("extra_embedder.0", "time_extra_emb.extra_embedder.linear_1"),
    ("extra_embedder.2", "time_extra_emb.extra_embedder.linear_2"),
    ("blocks.{}.default_modulation.1", "blocks.{}.norm1.linear"),
    ("blocks.{}.norm1", "blocks.{}.norm1.norm"),
    ("blocks.{}.attn1.Wqkv", ("blocks.{}.attn1.to_q", "blocks.{}.attn1.to_k", "blocks.{}.attn1.to_v")),
    ("blocks.{}.attn1.q_norm", "blocks.{}.attn1.norm_q"),
    ("blocks.{}.attn1.k_norm", "blocks.{}.attn1.norm_k"),
    ("blocks.{}.attn1.out_proj", "blocks.{}.attn1.to_out.0"),
    ("blocks.{}.norm3", "blocks.{}.norm2"),
    ("blocks.{}.attn2.q_proj", "blocks.{}.attn2.to_q"),
    ("blocks.{}.attn2.kv_proj", ("blocks.{}.attn2.to_k", "blocks.{}.attn2.to_v")),
    ("blocks.{}.attn2.q_norm", "blocks.{}.attn2.norm_q"),
    ("blocks.{}.attn2.k_norm", "blocks.{}.attn2.norm_k"),
    ("blocks.{}.attn2.out_proj", "blocks.{}.attn2.to_out.0"),
    ("blocks.{}.norm2", "blocks.{}.norm3"),
    ("blocks.{}.mlp.fc1", "blocks.{}.ff.net.0.proj"),
    ("blocks.{}.mlp.fc2", "blocks.{}.ff.net.2"),
    ("blocks.{}.skip_norm", None),
    ("blocks.{}.skip_linear", None),
    # (shift, scale) in the checkpoint, (scale, shift) in diffusers.
    ("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
    ("final_layer.linear", "proj_out"),
)

_BERT = Table(
    same(
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
        "embeddings.token_type_embeddings",
        "embeddings.LayerNorm",
        "encoder.layer.{}.attention.self.query",
        "encoder.layer.{}.attention.self.key",
        "encoder.layer.{}.attention.self.value",
        "encoder.layer.{}.attention.output.dense",
        "encoder.layer.{}.attention.output.LayerNorm",
        "encoder.layer.{}.intermediate.dense",
        "encoder.layer.{}.output.dense",
        "encoder.layer.{}.output.LayerNorm",
    )
)

ARCH = Arch(
    name="hunyuan_dit",
    title="Hunyuan-DiT",
    components=(
        Component(
            "denoiser",
            {
                "kohya": ("lora_unet_",),
                "diffusers": ("transformer.",),
                "peft": ("base_model.model.",),
                "comfy": ("diffusion_model.",),
                "lycoris": ("lycoris_", "lora_unet_"),
                "onetrainer": ("lora_transformer_", "lora_unet_"),
                "ai-toolkit": ("transformer.",),
                "checkpoint": ("model.diffusion_model.",),
            },
            Table(_ROWS),
            kohya_dialect=NATIVE,
            # Tencent's own adapters are PEFT's around its own names, which is what ComfyUI reads.
            dialects={"peft": NATIVE},
        ),
        Component(
            "text_encoder",
            {
                "kohya": ("lora_te1_",),
                "diffusers": ("text_encoder.",),
                "comfy": ("text_encoders.hydit_clip.transformer.bert.",),
                "lycoris": ("lora_te1_",),
                "onetrainer": ("lora_te1_",),
            },
            _BERT,
            kohya_dialect=DIFFUSERS,
        ),
    ),
    base_models=("hunyuandit", "hunyuan-dit"),
    # Wan's blocks are spelt alike in diffusers.
    widths=(
        Width(
            "denoiser", ("attn1.Wqkv", "attn1.out_proj", "attn2.q_proj", "attn2.out_proj", "mlp.fc1"), 1408
        ),
        Width("denoiser", ("attn2.kv_proj",), 1024),
    ),
    depths={"blocks": 40},
)
