"""Stable Diffusion XL: a UNet of three levels with deep transformers, CLIP ViT-L/14 and OpenCLIP bigG/14."""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._blocks import SDXL_VECTORS, UNET_BLOCKS
from loratools.archs._clip import CLIP, CLIP_READS_HIDDEN, OPENCLIP, OPENCLIP_READS_HIDDEN
from loratools.archs._table import DIFFUSERS, NATIVE, Component
from loratools.archs._unet import PREFIXES, unet

ARCH = Arch(
    name="sdxl",
    title="Stable Diffusion XL",
    components=(
        Component(
            "denoiser",
            PREFIXES,
            unet(attention=(False, True, True), size_embedding=True),
            kohya_dialect=NATIVE,
        ),
        Component(
            "text_encoder",
            {
                "kohya": ("lora_te1_",),
                "diffusers": ("text_encoder.",),
                "peft": ("base_model.model.",),
                "comfy": ("text_encoders.clip_l.transformer.",),
                "lycoris": ("lora_te1_",),
                "onetrainer": ("lora_te1_",),
                "checkpoint": ("conditioner.embedders.0.transformer.",),
            },
            CLIP,
            kohya_dialect=DIFFUSERS,
        ),
        Component(
            "text_encoder_2",
            {
                "kohya": ("lora_te2_",),
                "diffusers": ("text_encoder_2.",),
                "comfy": ("text_encoders.clip_g.transformer.",),
                "lycoris": ("lora_te2_",),
                "onetrainer": ("lora_te2_",),
                "checkpoint": ("conditioner.embedders.1.model.",),
            },
            OPENCLIP,
            kohya_dialect=DIFFUSERS,
            # ComfyUI names it as Hugging Face does.
            dialects={"comfy": DIFFUSERS},
        ),
    ),
    kohya_versions=("sdxl_base_v1-0", "sdxl_base_v0-9", "sdxl_1.0", "sdxl"),
    modelspec=("stable-diffusion-xl-v1-base", "stable-diffusion-xl-v0-9-base"),
    base_models=("stable-diffusion-xl", "sdxl", "sd-xl"),
    widths=(
        Width("denoiser", ("attn2.to_k", "attn2.to_v"), 2048),
        Width("text_encoder", CLIP_READS_HIDDEN, 768),
        Width("text_encoder_2", OPENCLIP_READS_HIDDEN, 1280),
    ),
    blocks=UNET_BLOCKS,
    vectors=SDXL_VECTORS,
)
