"""PixArt-α and PixArt-Σ: one kind of block, with cross-attention to T5 XXL."""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._t5 import T5_ENCODER
from loratools.archs._table import DIFFUSERS, NATIVE, Component, Row, Table

_ROWS: tuple[Row, ...] = (
    ("x_embedder.proj", "pos_embed.proj"),
    ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    ("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2"),
    # Sizes and aspect ratios condition only α at 1024 pixels.
    ("csize_embedder.mlp.0", "adaln_single.emb.resolution_embedder.linear_1"),
    ("csize_embedder.mlp.2", "adaln_single.emb.resolution_embedder.linear_2"),
    ("ar_embedder.mlp.0", "adaln_single.emb.aspect_ratio_embedder.linear_1"),
    ("ar_embedder.mlp.2", "adaln_single.emb.aspect_ratio_embedder.linear_2"),
    ("t_block.1", "adaln_single.linear"),
    ("blocks.{}.scale_shift_table", "transformer_blocks.{}.scale_shift_table"),
    (
        "blocks.{}.attn.qkv",
        (
            "transformer_blocks.{}.attn1.to_q",
            "transformer_blocks.{}.attn1.to_k",
            "transformer_blocks.{}.attn1.to_v",
        ),
    ),
    ("blocks.{}.attn.proj", "transformer_blocks.{}.attn1.to_out.0"),
    ("blocks.{}.cross_attn.q_linear", "transformer_blocks.{}.attn2.to_q"),
    (
        "blocks.{}.cross_attn.kv_linear",
        ("transformer_blocks.{}.attn2.to_k", "transformer_blocks.{}.attn2.to_v"),
    ),
    ("blocks.{}.cross_attn.proj", "transformer_blocks.{}.attn2.to_out.0"),
    ("blocks.{}.mlp.fc1", "transformer_blocks.{}.ff.net.0.proj"),
    ("blocks.{}.mlp.fc2", "transformer_blocks.{}.ff.net.2"),
    ("final_layer.scale_shift_table", "scale_shift_table"),
    ("final_layer.linear", "proj_out"),
)

ARCH = Arch(
    name="pixart",
    title="PixArt",
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
                # ComfyUI and OneTrainer number even a lone T5; OneTrainer's older files do not.
                "kohya": ("lora_te1_", "lora_te_"),
                "diffusers": ("text_encoder.",),
                "comfy": ("text_encoders.t5xxl.transformer.",),
                "lycoris": ("lora_te1_",),
                "onetrainer": ("lora_te_", "lora_te1_"),
                "checkpoint": ("text_encoders.t5xxl.transformer.",),
            },
            T5_ENCODER,
            kohya_dialect=DIFFUSERS,
        ),
    ),
    base_models=("pixart",),
    widths=(
        # Sana and LTX-Video spell their attention alike.
        Width(
            "denoiser",
            ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "mlp.fc1"),
            1152,
        ),
        Width("text_encoder", ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"), 4096),
    ),
)
