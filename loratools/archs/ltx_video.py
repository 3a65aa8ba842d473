"""LTX-Video: a transformer of blocks that attend to themselves and to the prompt, which all files name alike."""

from __future__ import annotations

from loratools.archs._arch import Arch, Proportion, Width
from loratools.archs._table import NATIVE, Component, Row, Table, same

_ROWS: tuple[Row, ...] = (
    ("patchify_proj", "proj_in"),
    ("adaln_single.emb.timestep_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_1"),
    ("adaln_single.emb.timestep_embedder.linear_2", "time_embed.emb.timestep_embedder.linear_2"),
    ("adaln_single.linear", "time_embed.linear"),
    *same(
        "caption_projection.linear_1",
        "caption_projection.linear_2",
        "transformer_blocks.{}.scale_shift_table",
        "transformer_blocks.{}.attn1.to_q",
        "transformer_blocks.{}.attn1.to_k",
        "transformer_blocks.{}.attn1.to_v",
        "transformer_blocks.{}.attn1.to_out.0",
        "transformer_blocks.{}.attn2.to_q",
        "transformer_blocks.{}.attn2.to_k",
        "transformer_blocks.{}.attn2.to_v",
        "transformer_blocks.{}.attn2.to_out.0",
        "transformer_blocks.{}.ff.net.0.proj",
        "transformer_blocks.{}.ff.net.2",
        "scale_shift_table",
        "proj_out",
    ),
    ("transformer_blocks.{}.attn1.q_norm", "transformer_blocks.{}.attn1.norm_q"),
    ("transformer_blocks.{}.attn1.k_norm", "transformer_blocks.{}.attn1.norm_k"),
    ("transformer_blocks.{}.attn2.q_norm", "transformer_blocks.{}.attn2.norm_q"),
    ("transformer_blocks.{}.attn2.k_norm", "transformer_blocks.{}.attn2.norm_k"),
)

_READS_HIDDEN = (
    *(f"{attention}.to_{part}" for attention in ("attn1", "attn2") for part in "qkv"),
    "ff.net.0.proj",
)

ARCH = Arch(
    name="ltx_video",
    title="LTX-Video",
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
    ),
    base_models=("ltx-video", "ltxv"),
    # Of 2 and of 13 billion parameters. CogVideoX, PixArt and Sana spell their blocks alike in diffusers.
    widths=(Width("denoiser", _READS_HIDDEN, 2048), Width("denoiser", _READS_HIDDEN, 4096)),
    # The prompt is brought to the model's own width first; Anima's, under the same names, is not.
    proportions=(Proportion(("attn2.to_k", "attn2.to_v"), 1, 1),),
    # LTX-2 has a second stream, for sound.
    foreign=("audio",),
)
