"""Ideogram 4: one stream of text and image tokens, with gated MLPs.

Source: the transformer of diffusers, and its loader of adapters.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._table import NATIVE, Component, Row, Table, same

_ROWS: tuple[Row, ...] = (
    *same(
        "input_proj",
        "llm_cond_norm",
        "llm_cond_proj",
        "t_embedding.mlp_in",
        "t_embedding.mlp_out",
        "adaln_proj",
        "embed_image_indicator",
        "layers.{}.adaln_modulation",
    ),
    (
        "layers.{}.attention.qkv",
        ("layers.{}.attention.to_q", "layers.{}.attention.to_k", "layers.{}.attention.to_v"),
    ),
    ("layers.{}.attention.o", "layers.{}.attention.to_out.0"),
    *same(
        "layers.{}.feed_forward.w1",
        "layers.{}.feed_forward.w2",
        "layers.{}.feed_forward.w3",
        "final_layer.adaln_modulation",
        "final_layer.linear",
    ),
)

ARCH = Arch(
    name="ideogram4",
    title="Ideogram 4",
    components=(
        Component(
            "denoiser",
            {
                "kohya": ("lora_unet_",),
                "diffusers": ("transformer.",),
                "peft": ("base_model.model.",),
                # fal's trainer names the network that sees the prompt; there is another that does not.
                "comfy": ("diffusion_model.", "conditional_transformer."),
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
    base_models=("ideogram-4", "ideogram4"),
    # Z-Image and Lumina 2 spell their fused attention and MLP alike.
    widths=(Width("denoiser", ("attention.qkv", "attention.o", "feed_forward.w1", "feed_forward.w3"), 4608),),
)
