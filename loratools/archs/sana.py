"""Sana, its 1.5 and Sprint: linear attention, convolutions for an MLP, and Gemma 2 encoding text."""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._table import DIFFUSERS, NATIVE, Component, Row, Table, same

_ROWS: tuple[Row, ...] = (
    ("x_embedder.proj", "patch_embed.proj"),
    ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    ("attention_y_norm", "caption_norm"),
    ("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2"),
    ("t_block.1", "time_embed.linear"),
    ("blocks.{}.scale_shift_table", "transformer_blocks.{}.scale_shift_table"),
    (
        "blocks.{}.attn.qkv",
        (
            "transformer_blocks.{}.attn1.to_q",
            "transformer_blocks.{}.attn1.to_k",
            "transformer_blocks.{}.attn1.to_v",
        ),
    ),
    # Queries and keys are normalised only in 1.5 and Sprint.
    ("blocks.{}.attn.q_norm", "transformer_blocks.{}.attn1.norm_q"),
    ("blocks.{}.attn.k_norm", "transformer_blocks.{}.attn1.norm_k"),
    ("blocks.{}.attn.proj", "transformer_blocks.{}.attn1.to_out.0"),
    ("blocks.{}.cross_attn.q_linear", "transformer_blocks.{}.attn2.to_q"),
    (
        "blocks.{}.cross_attn.kv_linear",
        ("transformer_blocks.{}.attn2.to_k", "transformer_blocks.{}.attn2.to_v"),
    ),
    ("blocks.{}.cross_attn.q_norm", "transformer_blocks.{}.attn2.norm_q"),
    ("blocks.{}.cross_attn.k_norm", "transformer_blocks.{}.attn2.norm_k"),
    ("blocks.{}.cross_attn.proj", "transformer_blocks.{}.attn2.to_out.0"),
    ("blocks.{}.mlp.inverted_conv.conv", "transformer_blocks.{}.ff.conv_inverted"),
    ("blocks.{}.mlp.depth_conv.conv", "transformer_blocks.{}.ff.conv_depth"),
    ("blocks.{}.mlp.point_conv.conv", "transformer_blocks.{}.ff.conv_point"),
    ("final_layer.scale_shift_table", "scale_shift_table"),
    ("final_layer.linear", "proj_out"),
)

_GEMMA2 = Table(
    same(
        "embed_tokens",
        "layers.{}.input_layernorm",
        "layers.{}.self_attn.q_proj",
        "layers.{}.self_attn.k_proj",
        "layers.{}.self_attn.v_proj",
        "layers.{}.self_attn.o_proj",
        "layers.{}.post_attention_layernorm",
        "layers.{}.pre_feedforward_layernorm",
        "layers.{}.mlp.gate_proj",
        "layers.{}.mlp.up_proj",
        "layers.{}.mlp.down_proj",
        "layers.{}.post_feedforward_layernorm",
        "norm",
    )
)

_READS_HIDDEN = (
    "attn.qkv",
    "attn.proj",
    "cross_attn.q_linear",
    "cross_attn.kv_linear",
    "mlp.inverted_conv.conv",
)

ARCH = Arch(
    name="sana",
    title="Sana",
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
        ),
        Component(
            "text_encoder",
            {
                "kohya": ("lora_te_",),
                "diffusers": ("text_encoder.",),
                "lycoris": ("lora_te_",),
                "onetrainer": ("lora_te_",),
            },
            _GEMMA2,
            kohya_dialect=DIFFUSERS,
        ),
    ),
    base_models=("sana-", "sana1-"),
    # PixArt, LTX-Video and CogVideoX spell their attention alike. The two sizes are that of 1.6B and 4.8B, and
    # that of 0.6B, which is PixArt's: there only the MLP or metadata tell.
    widths=(
        Width("denoiser", _READS_HIDDEN, 2240),
        Width("denoiser", _READS_HIDDEN, 1152),
        Width(
            "text_encoder", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"), 2304
        ),
    ),
)
