"""Hunyuan Video 1.5: double stream blocks alone, which keep q, k and v apart."""

from __future__ import annotations

from loratools.archs._arch import Arch, Proportion, Width
from loratools.archs._blocks import Block
from loratools.archs._table import NATIVE, Component, Row, Table
from loratools.archs.hunyuan_video import EMBEDDERS, FINAL_LAYER, PREFIXES, STREAMS

BYT5: tuple[Row, ...] = (
    ("byt5_in.layernorm", "context_embedder_2.norm"),
    ("byt5_in.fc1", "context_embedder_2.linear_1"),
    ("byt5_in.fc2", "context_embedder_2.linear_2"),
    ("byt5_in.fc3", "context_embedder_2.linear_3"),
)

_ROWS: tuple[Row, ...] = (
    *EMBEDDERS,
    *BYT5,
    ("vision_in.proj.0", "image_embedder.norm_in"),
    ("vision_in.proj.1", "image_embedder.linear_1"),
    ("vision_in.proj.3", "image_embedder.linear_2"),
    ("vision_in.proj.4", "image_embedder.norm_out"),
    ("cond_type_embedding", "cond_type_embed"),
    ("time_in.mlp.0", "time_embed.timestep_embedder.linear_1"),
    ("time_in.mlp.2", "time_embed.timestep_embedder.linear_2"),
    ("double_blocks.{}.img_attn_q", "transformer_blocks.{}.attn.to_q"),
    ("double_blocks.{}.img_attn_k", "transformer_blocks.{}.attn.to_k"),
    ("double_blocks.{}.img_attn_v", "transformer_blocks.{}.attn.to_v"),
    ("double_blocks.{}.txt_attn_q", "transformer_blocks.{}.attn.add_q_proj"),
    ("double_blocks.{}.txt_attn_k", "transformer_blocks.{}.attn.add_k_proj"),
    ("double_blocks.{}.txt_attn_v", "transformer_blocks.{}.attn.add_v_proj"),
    *STREAMS,
    *FINAL_LAYER,
)

ARCH = Arch(
    name="hunyuan_video15",
    title="Hunyuan Video 1.5",
    components=(
        Component("denoiser", PREFIXES, Table(_ROWS), kohya_dialect=NATIVE, dialects={"ai-toolkit": NATIVE}),
    ),
    kohya_versions=("hunyuan_video_1_5",),
    modelspec=("hunyuan-video-1.5",),
    base_models=("hunyuanvideo-1-5", "hunyuanvideo1-5", "hunyuanvideo15", "hunyuan-video-1-5"),
    widths=(
        Width(
            "denoiser",
            tuple(f"{stream}_attn_{part}" for stream in ("img", "txt") for part in ("q", "k", "v", "proj")),
            2048,
        ),
    ),
    derived_from="hunyuan_video",
    proportions=(
        Proportion(("img_mlp.fc1", "txt_mlp.fc1"), 4, 1),
        Proportion(("img_mlp.fc2", "txt_mlp.fc2"), 1, 4),
    ),
    depths={"double_blocks": 54},
    blocks=(Block("D", "denoiser", "double_blocks.{}"),),
)
