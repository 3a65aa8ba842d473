"""Stable Cascade's stage C, the prior: a UNet of residual, timestep and attention blocks, and CLIP bigG/14.

The checkpoint fuses the attention's q, k and v in a bare parameter. ComfyUI and OneTrainer name the pieces in
their place within the fused attention, which is the dialect "comfy".
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._clip import CLIP, CLIP_READS_HIDDEN
from loratools.archs._table import DIFFUSERS, Component, Row, Table, same

_COMFY = "comfy"

_ENDS = same(
    "clip_txt_pooled_mapper",
    "clip_txt_mapper",
    "clip_img_mapper",
    "embedding.1",
    "down_downscalers.{}.1.blocks.0",
    "up_upscalers.{}.1.blocks.1",
    "clf.1",
)
_HALVES = ("down_blocks.{}.{}", "up_blocks.{}.{}")
_BLOCK = (
    "depthwise",
    "channelwise.0",
    "channelwise.2.gamma",
    "channelwise.2.beta",
    "channelwise.4",
    "mapper",
    "mapper_sca",
    "mapper_crp",
    "kv_mapper.1",
)


def _rows(pieces: str, out: str) -> tuple[Row, ...]:
    """A column, by how it spells the attention's place before q, k and v, and the whole of its output."""
    return (
        *_ENDS,
        *same(*(f"{half}.{name}" for half in _HALVES for name in _BLOCK)),
        *(
            (f"{half}.attention.attn.in_proj", tuple(f"{half}.{pieces}.to_{part}" for part in "qkv"))
            for half in _HALVES
        ),
        *((f"{half}.attention.attn.out_proj", f"{half}.{out}") for half in _HALVES),
    )


ARCH = Arch(
    name="stable_cascade",
    title="Stable Cascade",
    components=(
        Component(
            "denoiser",
            {
                "kohya": ("lora_prior_unet_", "lora_unet_"),
                "diffusers": ("prior.",),
                "peft": ("base_model.model.",),
                "comfy": ("diffusion_model.",),
                "lycoris": ("lycoris_", "lora_unet_"),
                "onetrainer": ("lora_prior_unet_", "lora_unet_"),
                "checkpoint": ("model.diffusion_model.",),
            },
            Table(
                _rows("attention", "attention.to_out.0"),
                {_COMFY: _rows("attention.attn", "attention.attn.out_proj")},
            ),
            kohya_dialect=_COMFY,
            dialects={"comfy": _COMFY, "onetrainer": _COMFY},
        ),
        Component(
            "text_encoder",
            {
                "kohya": ("lora_prior_te_",),
                "diffusers": ("text_encoder.",),
                "comfy": ("text_encoders.clip_g.transformer.",),
                "lycoris": ("lora_prior_te_",),
                "onetrainer": ("lora_prior_te_",),
                "checkpoint": ("text_encoders.clip_g.transformer.",),
            },
            CLIP,
            kohya_dialect=DIFFUSERS,
        ),
    ),
    base_models=("stable-cascade", "stablecascade"),
    widths=(Width("text_encoder", CLIP_READS_HIDDEN, 1280),),
)
