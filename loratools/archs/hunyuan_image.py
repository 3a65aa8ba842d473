"""Hunyuan Image 2.1: Hunyuan Video's blocks at another width, for single images.

ComfyUI has Flux.1's names for them, and unlike for Hunyuan Video does not understand the checkpoint's own.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._table import NATIVE, Component, Row, Table
from loratools.archs.hunyuan_video import (
    BLOCKS,
    COMFY_NAMES,
    EMBEDDERS,
    FINAL_LAYER,
    FUSED,
    FUSED_PROPORTIONS,
    PREFIXES,
    STREAMS,
)
from loratools.archs.hunyuan_video15 import BYT5

_ROWS: tuple[Row, ...] = (
    *EMBEDDERS,
    *BYT5,
    ("time_in.mlp.0", "time_guidance_embed.timestep_embedder.linear_1"),
    ("time_in.mlp.2", "time_guidance_embed.timestep_embedder.linear_2"),
    # The distilled model: the end of its step, and guidance.
    ("time_r_in.mlp.0", "time_guidance_embed.timestep_embedder_r.linear_1"),
    ("time_r_in.mlp.2", "time_guidance_embed.timestep_embedder_r.linear_2"),
    ("guidance_in.mlp.0", "time_guidance_embed.guidance_embedder.linear_1"),
    ("guidance_in.mlp.2", "time_guidance_embed.guidance_embedder.linear_2"),
    *STREAMS,
    *FUSED,
    *FINAL_LAYER,
)
_READ_HIDDEN = tuple(
    f"{stream}_{part}"
    for stream in ("img", "txt")
    for part in ("mod.linear", "attn_qkv", "attn_proj", "mlp.fc1")
)
_COMFY = "comfy"
_COMFY_ROWS: tuple[Row, ...] = tuple((native, COMFY_NAMES.get(native)) for native, _ in _ROWS)

ARCH = Arch(
    name="hunyuan_image",
    title="Hunyuan Image 2.1",
    components=(
        Component(
            "denoiser",
            PREFIXES,
            Table(_ROWS, {_COMFY: _COMFY_ROWS}),
            kohya_dialect=NATIVE,
            dialects={"comfy": _COMFY, "ai-toolkit": NATIVE},
        ),
    ),
    kohya_versions=("hunyuan-image-2.1",),
    modelspec=("hunyuan-image-2.1",),
    base_models=("hunyuanimage-2", "hunyuanimage2", "hunyuan-image-2"),
    widths=(
        Width("denoiser", (*_READ_HIDDEN, "linear1"), 3584),
        Width("denoiser", ("img_mlp.fc2", "txt_mlp.fc2"), 14336),
        Width("denoiser", ("linear2",), 17920),
    ),
    proportions=FUSED_PROPORTIONS,
    depths={"double_blocks": 20, "single_blocks": 40},
    derived_from="hunyuan_video",
    borrowed=_COMFY,
    blocks=BLOCKS,
)
