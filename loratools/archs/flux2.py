"""Flux.2 dev and Klein: Flux's blocks with gated MLPs, no biases, and one modulation for all blocks of a kind.

Single blocks stay fused in diffusers too: their ``linear1`` is ``attn.to_qkv_mlp_proj``.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Proportion, Width
from loratools.archs._blocks import Block
from loratools.archs._table import NATIVE, Component, Row, Table, swapped

_ROWS: tuple[Row, ...] = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    ("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
    ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    ("single_stream_modulation.lin", "single_stream_modulation.linear"),
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
    ("double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.linear_in"),
    ("double_blocks.{}.img_mlp.2", "transformer_blocks.{}.ff.linear_out"),
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
    ("double_blocks.{}.txt_mlp.0", "transformer_blocks.{}.ff_context.linear_in"),
    ("double_blocks.{}.txt_mlp.2", "transformer_blocks.{}.ff_context.linear_out"),
    ("single_blocks.{}.linear1", "single_transformer_blocks.{}.attn.to_qkv_mlp_proj"),
    ("single_blocks.{}.norm.query_norm", "single_transformer_blocks.{}.attn.norm_q"),
    ("single_blocks.{}.norm.key_norm", "single_transformer_blocks.{}.attn.norm_k"),
    ("single_blocks.{}.linear2", "single_transformer_blocks.{}.attn.to_out"),
    # (shift, scale) in the checkpoint, (scale, shift) in diffusers.
    ("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
    ("final_layer.linear", "proj_out"),
)

_READS_HIDDEN = ("img_attn.qkv", "txt_attn.qkv", "linear1")

ARCH = Arch(
    name="flux2",
    title="Flux.2",
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
                "musubi": ("lora_unet_",),
                "checkpoint": ("model.diffusion_model.",),
            },
            Table(_ROWS),
            kohya_dialect=NATIVE,
            dialects={"ai-toolkit": NATIVE},
        ),
    ),
    kohya_versions=("flux_2_dev", "flux_2_klein_9b", "flux_2_klein_4b", "flux2"),
    modelspec=("flux.2-dev", "flux.2-klein-9b", "flux.2-klein-4b"),
    base_models=("flux-2", "flux2"),
    # Dev, Klein 9B, and Klein 4B, which has Flux.1's width; the gated MLPs are higher in all of them.
    widths=tuple(Width("denoiser", _READS_HIDDEN, size) for size in (6144, 4096, 3072)),
    proportions=(
        Proportion(("img_attn.qkv", "txt_attn.qkv"), 3, 1),
        Proportion(("img_mlp.0", "txt_mlp.0"), 6, 1),
        Proportion(("img_mlp.2", "txt_mlp.2"), 1, 3),
        Proportion(("linear1",), 9, 1),
        Proportion(("linear2",), 1, 4),
    ),
    depths={"double_blocks": 8, "single_blocks": 48},
    blocks=(
        Block("D", "denoiser", "double_blocks.{}"),
        Block("S", "denoiser", "single_blocks.{}"),
    ),
)
