"""Chroma: Flux.1's blocks, their modulations replaced by one distilled guidance layer, and T5-XXL alone.

What adapters usually train, the attention and MLPs of the blocks, has Flux.1's names and Flux.1's shapes.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Proportion, Width
from loratools.archs._blocks import Block
from loratools.archs._t5 import T5_ENCODER
from loratools.archs._table import DIFFUSERS, NATIVE, Component, Row, Table, same

_ROWS: tuple[Row, ...] = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    *same("distilled_guidance_layer.in_proj"),
    ("distilled_guidance_layer.layers.{}.in_layer", "distilled_guidance_layer.layers.{}.linear_1"),
    ("distilled_guidance_layer.layers.{}.out_layer", "distilled_guidance_layer.layers.{}.linear_2"),
    *same("distilled_guidance_layer.norms.{}", "distilled_guidance_layer.out_proj"),
    (
        "double_blocks.{}.img_attn.qkv",
        (
            "transformer_blocks.{}.attn.to_q",
            "transformer_blocks.{}.attn.to_k",
            "transformer_blocks.{}.attn.to_v",
        ),
    ),
    ("double_blocks.{}.img_attn.norm.query_norm", "transformer_blocks.{}.attn.norm_q"),
    ("double_blocks.{}.img_attn.norm.key_norm", "transformer_blocks.{}.attn.norm_k"),
    ("double_blocks.{}.img_attn.proj", "transformer_blocks.{}.attn.to_out.0"),
    ("double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.net.0.proj"),
    ("double_blocks.{}.img_mlp.2", "transformer_blocks.{}.ff.net.2"),
    (
        "double_blocks.{}.txt_attn.qkv",
        (
            "transformer_blocks.{}.attn.add_q_proj",
            "transformer_blocks.{}.attn.add_k_proj",
            "transformer_blocks.{}.attn.add_v_proj",
        ),
    ),
    ("double_blocks.{}.txt_attn.norm.query_norm", "transformer_blocks.{}.attn.norm_added_q"),
    ("double_blocks.{}.txt_attn.norm.key_norm", "transformer_blocks.{}.attn.norm_added_k"),
    ("double_blocks.{}.txt_attn.proj", "transformer_blocks.{}.attn.to_add_out"),
    ("double_blocks.{}.txt_mlp.0", "transformer_blocks.{}.ff_context.net.0.proj"),
    ("double_blocks.{}.txt_mlp.2", "transformer_blocks.{}.ff_context.net.2"),
    (
        "single_blocks.{}.linear1",
        (
            "single_transformer_blocks.{}.attn.to_q",
            "single_transformer_blocks.{}.attn.to_k",
            "single_transformer_blocks.{}.attn.to_v",
            ("single_transformer_blocks.{}.proj_mlp", 4),
        ),
    ),
    ("single_blocks.{}.norm.query_norm", "single_transformer_blocks.{}.attn.norm_q"),
    ("single_blocks.{}.norm.key_norm", "single_transformer_blocks.{}.attn.norm_k"),
    ("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out"),
    ("final_layer.linear", "proj_out"),
)

ARCH = Arch(
    name="chroma",
    title="Chroma",
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
                "ai-toolkit": ("diffusion_model.",),
                "checkpoint": ("model.diffusion_model.",),
            },
            Table(_ROWS),
            kohya_dialect=NATIVE,
            dialects={"ai-toolkit": NATIVE},
        ),
        Component(
            "text_encoder",
            {
                # sd-scripts keeps Flux's count of encoders; OneTrainer has one, which it numbers in Kohya's layout.
                "kohya": ("lora_te3_", "lora_te1_"),
                "diffusers": ("text_encoder.",),
                "peft": ("base_model.model.",),
                "comfy": ("text_encoders.t5xxl.transformer.",),
                "lycoris": ("lora_te3_",),
                "onetrainer": ("lora_te_", "lora_te1_"),
                "checkpoint": ("text_encoders.t5xxl.transformer.",),
            },
            T5_ENCODER,
            kohya_dialect=DIFFUSERS,
        ),
    ),
    kohya_versions=("chroma",),
    modelspec=("chroma",),
    base_models=("chroma",),
    widths=(
        Width("denoiser", ("img_attn.qkv", "txt_attn.qkv", "linear1"), 3072),
        Width("text_encoder", ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"), 4096),
    ),
    proportions=(
        Proportion(("img_attn.qkv", "txt_attn.qkv"), 3, 1),
        Proportion(("img_mlp.0", "txt_mlp.0"), 4, 1),
        Proportion(("linear1",), 7, 1),
        Proportion(("linear2",), 1, 5),
    ),
    depths={"double_blocks": 19, "single_blocks": 38},
    blocks=(
        Block("D", "denoiser", "double_blocks.{}"),
        Block("S", "denoiser", "single_blocks.{}"),
        Block("T5", "text_encoder"),
    ),
    derived_from="flux",
)
