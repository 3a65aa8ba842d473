"""Hunyuan Video 1.5: double stream blocks alone.

The original keeps q, k and v apart, and so do diffusers and the trainers. ComfyUI fuses them, under Flux.1's names:
these are the native column here, as no name of the original means the whole weight.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Proportion, Width
from loratools.archs._blocks import Block
from loratools.archs._table import NATIVE, Component, Row, Table
from loratools.archs.hunyuan_video import COMFY_NAMES, EMBEDDERS, FINAL_LAYER, PREFIXES, STREAMS

BYT5: tuple[Row, ...] = (
    ("byt5_in.layernorm", "context_embedder_2.norm"),
    ("byt5_in.fc1", "context_embedder_2.linear_1"),
    ("byt5_in.fc2", "context_embedder_2.linear_2"),
    ("byt5_in.fc3", "context_embedder_2.linear_3"),
)

_SHARED: tuple[Row, ...] = (
    *EMBEDDERS,
    *BYT5,
    ("vision_in.proj.0", "image_embedder.norm_in"),
    ("vision_in.proj.1", "image_embedder.linear_1"),
    ("vision_in.proj.3", "image_embedder.linear_2"),
    ("vision_in.proj.4", "image_embedder.norm_out"),
    ("cond_type_embedding", "cond_type_embed"),
    ("time_in.mlp.0", "time_embed.timestep_embedder.linear_1"),
    ("time_in.mlp.2", "time_embed.timestep_embedder.linear_2"),
    *STREAMS,
    *FINAL_LAYER,
)
_ROWS: tuple[Row, ...] = (
    *((COMFY_NAMES.get(original, original), twin) for original, twin in _SHARED),
    (
        "double_blocks.{}.img_attn.qkv",
        (
            "transformer_blocks.{}.attn.to_q",
            "transformer_blocks.{}.attn.to_k",
            "transformer_blocks.{}.attn.to_v",
        ),
    ),
    (
        "double_blocks.{}.txt_attn.qkv",
        (
            "transformer_blocks.{}.attn.add_q_proj",
            "transformer_blocks.{}.attn.add_k_proj",
            "transformer_blocks.{}.attn.add_v_proj",
        ),
    ),
)
_ORIGINAL = "original"
_ORIGINAL_ROWS: tuple[Row, ...] = (
    *((COMFY_NAMES.get(original, original), original) for original, _ in _SHARED),
    (
        "double_blocks.{}.img_attn.qkv",
        ("double_blocks.{}.img_attn_q", "double_blocks.{}.img_attn_k", "double_blocks.{}.img_attn_v"),
    ),
    (
        "double_blocks.{}.txt_attn.qkv",
        ("double_blocks.{}.txt_attn_q", "double_blocks.{}.txt_attn_k", "double_blocks.{}.txt_attn_v"),
    ),
)

ARCH = Arch(
    name="hunyuan_video15",
    title="Hunyuan Video 1.5",
    components=(
        Component(
            "denoiser",
            PREFIXES,
            Table(_ROWS, {_ORIGINAL: _ORIGINAL_ROWS}),
            kohya_dialect=_ORIGINAL,
            dialects={"checkpoint": _ORIGINAL, "ai-toolkit": NATIVE},
        ),
    ),
    kohya_versions=("hunyuan_video_1_5",),
    modelspec=("hunyuan-video-1.5",),
    base_models=("hunyuanvideo-1-5", "hunyuanvideo1-5", "hunyuanvideo15", "hunyuan-video-1-5"),
    widths=(
        Width(
            "denoiser",
            tuple(f"{stream}_attn.{part}" for stream in ("img", "txt") for part in ("qkv", "proj")),
            2048,
        ),
    ),
    derived_from="hunyuan_video",
    borrowed=NATIVE,
    proportions=(
        Proportion(("img_attn.qkv", "txt_attn.qkv"), 3, 1),
        Proportion(("img_mlp.0", "txt_mlp.0"), 4, 1),
        Proportion(("img_mlp.2", "txt_mlp.2"), 1, 4),
    ),
    depths={"double_blocks": 54},
    blocks=(Block("D", "denoiser", "double_blocks.{}"),),
)
