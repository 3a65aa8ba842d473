"""Wan 2.1 and 2.2, text and image to video: a transformer of blocks that attend to themselves and to the prompt.

Image to video models of 2.1 attend to the image's embedding as well (``k_img``, ``v_img``). Wan 2.2 has two such
transformers, for high and for low noise; trainers write a file for each. VACE adds blocks of its own.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Proportion, Width
from loratools.archs._table import NATIVE, Component, Row, Table

_BLOCK = (
    ("modulation", "scale_shift_table"),
    ("self_attn.q", "attn1.to_q"),
    ("self_attn.k", "attn1.to_k"),
    ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"),
    ("self_attn.norm_q", "attn1.norm_q"),
    ("self_attn.norm_k", "attn1.norm_k"),
    # The norm before cross attention, which the checkpoint counts as the third.
    ("norm3", "norm2"),
    ("cross_attn.q", "attn2.to_q"),
    ("cross_attn.k", "attn2.to_k"),
    ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.norm_q", "attn2.norm_q"),
    ("cross_attn.norm_k", "attn2.norm_k"),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
)

_ROWS: tuple[Row, ...] = (
    ("patch_embedding", None),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    *((f"blocks.{{}}.{native}", f"blocks.{{}}.{twin}") for native, twin in _BLOCK),
    ("vace_patch_embedding", None),
    *((f"vace_blocks.{{}}.{native}", f"vace_blocks.{{}}.{twin}") for native, twin in _BLOCK),
    ("vace_blocks.{}.before_proj", "vace_blocks.{}.proj_in"),
    ("vace_blocks.{}.after_proj", "vace_blocks.{}.proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
)

_READS_HIDDEN = (
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "cross_attn.q",
    "cross_attn.k",
    "cross_attn.v",
    "ffn.0",
)

ARCH = Arch(
    name="wan",
    title="Wan",
    components=(
        Component(
            "denoiser",
            {
                "kohya": ("lora_unet_",),
                # The second is Wan 2.2's low noise transformer; alone in a file it may be under either.
                "diffusers": ("transformer.", "transformer_2."),
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
    kohya_versions=("wan",),
    base_models=("wan-ai", "wan2", "wan-2"),
    # Of 1.3, 5 and 14 billion parameters. Hunyuan-DiT spells its attention alike in diffusers, and reads the prompt
    # at a width of its own.
    widths=tuple(Width("denoiser", _READS_HIDDEN, size) for size in (1536, 3072, 5120)),
    proportions=(Proportion(("cross_attn.k", "cross_attn.v", "cross_attn.k_img", "cross_attn.v_img"), 1, 1),),
)
