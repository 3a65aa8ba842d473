"""Stable Diffusion 2.x: the UNet of 1.x with other widths, and OpenCLIP ViT-H/14."""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._blocks import SD_VECTORS, UNET_BLOCKS
from loratools.archs._clip import OPENCLIP, OPENCLIP_READS_HIDDEN
from loratools.archs._table import DIFFUSERS, Component
from loratools.archs._unet import PREFIXES
from loratools.archs.sd15 import UNET

ARCH = Arch(
    name="sd2",
    title="Stable Diffusion 2.x",
    components=(
        Component("denoiser", PREFIXES, UNET, kohya_dialect=DIFFUSERS),
        Component(
            "text_encoder",
            {
                "kohya": ("lora_te_",),
                "diffusers": ("text_encoder.",),
                "peft": ("base_model.model.",),
                "comfy": ("text_encoders.clip_h.transformer.",),
                "lycoris": ("lora_te_",),
                "onetrainer": ("lora_te_",),
                "checkpoint": ("cond_stage_model.model.",),
            },
            OPENCLIP,
            kohya_dialect=DIFFUSERS,
            # ComfyUI names it as Hugging Face does.
            dialects={"comfy": DIFFUSERS},
        ),
    ),
    kohya_versions=("sd_v2", "sd_v2_v", "sd_2.0", "sd_2.1"),
    modelspec=("stable-diffusion-v2-512", "stable-diffusion-v2-768-v"),
    base_models=(
        "stable-diffusion-2",
        "stable-diffusion-v2",
        "sd-2-",
        "sd2-",
        "sd21",
        "v2-1-768",
        "v2-1-512",
    ),
    widths=(
        Width("denoiser", ("attn2.to_k", "attn2.to_v"), 1024),
        Width("text_encoder", OPENCLIP_READS_HIDDEN, 1024),
    ),
    blocks=UNET_BLOCKS,
    vectors=SD_VECTORS,
)
