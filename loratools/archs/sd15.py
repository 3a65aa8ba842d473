"""Stable Diffusion 1.x: a UNet with attention on its three finest levels, and CLIP ViT-L/14."""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._blocks import SD_VECTORS, UNET_BLOCKS
from loratools.archs._clip import CLIP, CLIP_READS_HIDDEN
from loratools.archs._table import DIFFUSERS, Component
from loratools.archs._unet import PREFIXES, unet

# Stable Diffusion 2 has the same UNet but for its widths. One transformer block in each attention.
UNET = unet(attention=(True, True, True, False), transformer="0")

ARCH = Arch(
    name="sd15",
    title="Stable Diffusion 1.x",
    components=(
        Component("denoiser", PREFIXES, UNET, kohya_dialect=DIFFUSERS),
        Component(
            "text_encoder",
            {
                "kohya": ("lora_te_",),
                "diffusers": ("text_encoder.",),
                "peft": ("base_model.model.",),
                "comfy": ("text_encoders.clip_l.transformer.",),
                "lycoris": ("lora_te_",),
                "onetrainer": ("lora_te_",),
                "checkpoint": ("cond_stage_model.transformer.",),
            },
            CLIP,
            kohya_dialect=DIFFUSERS,
        ),
    ),
    kohya_versions=("sd_v1", "sd_1.5", "sd_v1.5"),
    modelspec=("stable-diffusion-v1",),
    base_models=(
        "stable-diffusion-v1",
        "stable-diffusion-1",
        "sd-v1",
        "sd-1-5",
        "sd1-5",
        "sd15",
        "v1-5-pruned",
    ),
    widths=(
        Width("denoiser", ("attn2.to_k", "attn2.to_v"), 768),
        Width("text_encoder", CLIP_READS_HIDDEN, 768),
    ),
    blocks=UNET_BLOCKS,
    vectors=SD_VECTORS,
)
