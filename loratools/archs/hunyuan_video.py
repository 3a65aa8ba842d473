"""Hunyuan Video and FramePack: double and single stream blocks as Flux.1 has, and a refiner of the text's tokens.

FramePack's adapters have diffusers' names in every layout, Kohya's too; which are read, but what is written for Kohya
has the checkpoint's own names, as Hunyuan Video's trainers write them. ComfyUI has Flux.1's names for these blocks, and
understands the checkpoint's own behind ``diffusion_model.`` too.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.archs._arch import Arch, Proportion, Width
from loratools.archs._blocks import Block
from loratools.archs._clip import CLIP, CLIP_READS_HIDDEN
from loratools.archs._table import DIFFUSERS, NATIVE, Component, Row, Table, same, swapped

_REFINER = "txt_in.individual_token_refiner.blocks.{}"
_REFINER_TWIN = "context_embedder.token_refiner.refiner_blocks.{}"

# What ComfyUI calls weights of Tencent's models, where it is not what their checkpoints do: mostly as Flux.1's.
COMFY_NAMES: Mapping[str, str] = {
    "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.in_layer",
    "txt_in.t_embedder.mlp.2": "txt_in.t_embedder.out_layer",
    "txt_in.c_embedder.linear_1": "txt_in.c_embedder.in_layer",
    "txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer",
    "time_in.mlp.0": "time_in.in_layer",
    "time_in.mlp.2": "time_in.out_layer",
    "time_r_in.mlp.0": "time_r_in.in_layer",
    "time_r_in.mlp.2": "time_r_in.out_layer",
    "guidance_in.mlp.0": "guidance_in.in_layer",
    "guidance_in.mlp.2": "guidance_in.out_layer",
    f"{_REFINER}.self_attn_qkv": f"{_REFINER}.self_attn.qkv",
    f"{_REFINER}.self_attn_proj": f"{_REFINER}.self_attn.proj",
    f"{_REFINER}.mlp.fc1": f"{_REFINER}.mlp.0",
    f"{_REFINER}.mlp.fc2": f"{_REFINER}.mlp.2",
    "double_blocks.{}.img_mod.linear": "double_blocks.{}.img_mod.lin",
    "double_blocks.{}.img_attn_qkv": "double_blocks.{}.img_attn.qkv",
    "double_blocks.{}.img_attn_q_norm": "double_blocks.{}.img_attn.norm.query_norm",
    "double_blocks.{}.img_attn_k_norm": "double_blocks.{}.img_attn.norm.key_norm",
    "double_blocks.{}.img_attn_proj": "double_blocks.{}.img_attn.proj",
    "double_blocks.{}.img_mlp.fc1": "double_blocks.{}.img_mlp.0",
    "double_blocks.{}.img_mlp.fc2": "double_blocks.{}.img_mlp.2",
    "double_blocks.{}.txt_mod.linear": "double_blocks.{}.txt_mod.lin",
    "double_blocks.{}.txt_attn_qkv": "double_blocks.{}.txt_attn.qkv",
    "double_blocks.{}.txt_attn_q_norm": "double_blocks.{}.txt_attn.norm.query_norm",
    "double_blocks.{}.txt_attn_k_norm": "double_blocks.{}.txt_attn.norm.key_norm",
    "double_blocks.{}.txt_attn_proj": "double_blocks.{}.txt_attn.proj",
    "double_blocks.{}.txt_mlp.fc1": "double_blocks.{}.txt_mlp.0",
    "double_blocks.{}.txt_mlp.fc2": "double_blocks.{}.txt_mlp.2",
    "single_blocks.{}.modulation.linear": "single_blocks.{}.modulation.lin",
    "single_blocks.{}.q_norm": "single_blocks.{}.norm.query_norm",
    "single_blocks.{}.k_norm": "single_blocks.{}.norm.key_norm",
}

# Tencent's later models share these rows.
EMBEDDERS: tuple[Row, ...] = (
    ("img_in.proj", "x_embedder.proj"),
    ("txt_in.t_embedder.mlp.0", "context_embedder.time_text_embed.timestep_embedder.linear_1"),
    ("txt_in.t_embedder.mlp.2", "context_embedder.time_text_embed.timestep_embedder.linear_2"),
    ("txt_in.c_embedder.linear_1", "context_embedder.time_text_embed.text_embedder.linear_1"),
    ("txt_in.c_embedder.linear_2", "context_embedder.time_text_embed.text_embedder.linear_2"),
    ("txt_in.input_embedder", "context_embedder.proj_in"),
    (f"{_REFINER}.norm1", f"{_REFINER_TWIN}.norm1"),
    (
        f"{_REFINER}.self_attn_qkv",
        (f"{_REFINER_TWIN}.attn.to_q", f"{_REFINER_TWIN}.attn.to_k", f"{_REFINER_TWIN}.attn.to_v"),
    ),
    (f"{_REFINER}.self_attn_proj", f"{_REFINER_TWIN}.attn.to_out.0"),
    (f"{_REFINER}.norm2", f"{_REFINER_TWIN}.norm2"),
    (f"{_REFINER}.mlp.fc1", f"{_REFINER_TWIN}.ff.net.0.proj"),
    (f"{_REFINER}.mlp.fc2", f"{_REFINER_TWIN}.ff.net.2"),
    # A gate for the attention and one for the MLP, in both in this order.
    (f"{_REFINER}.adaLN_modulation.1", f"{_REFINER_TWIN}.norm_out.linear"),
)
STREAMS: tuple[Row, ...] = (
    ("double_blocks.{}.img_mod.linear", "transformer_blocks.{}.norm1.linear"),
    ("double_blocks.{}.img_attn_q_norm", "transformer_blocks.{}.attn.norm_q"),
    ("double_blocks.{}.img_attn_k_norm", "transformer_blocks.{}.attn.norm_k"),
    ("double_blocks.{}.img_attn_proj", "transformer_blocks.{}.attn.to_out.0"),
    ("double_blocks.{}.img_mlp.fc1", "transformer_blocks.{}.ff.net.0.proj"),
    ("double_blocks.{}.img_mlp.fc2", "transformer_blocks.{}.ff.net.2"),
    ("double_blocks.{}.txt_mod.linear", "transformer_blocks.{}.norm1_context.linear"),
    ("double_blocks.{}.txt_attn_q_norm", "transformer_blocks.{}.attn.norm_added_q"),
    ("double_blocks.{}.txt_attn_k_norm", "transformer_blocks.{}.attn.norm_added_k"),
    ("double_blocks.{}.txt_attn_proj", "transformer_blocks.{}.attn.to_add_out"),
    ("double_blocks.{}.txt_mlp.fc1", "transformer_blocks.{}.ff_context.net.0.proj"),
    ("double_blocks.{}.txt_mlp.fc2", "transformer_blocks.{}.ff_context.net.2"),
)
FUSED: tuple[Row, ...] = (
    (
        "double_blocks.{}.img_attn_qkv",
        (
            "transformer_blocks.{}.attn.to_q",
            "transformer_blocks.{}.attn.to_k",
            "transformer_blocks.{}.attn.to_v",
        ),
    ),
    (
        "double_blocks.{}.txt_attn_qkv",
        (
            "transformer_blocks.{}.attn.add_q_proj",
            "transformer_blocks.{}.attn.add_k_proj",
            "transformer_blocks.{}.attn.add_v_proj",
        ),
    ),
    ("single_blocks.{}.modulation.linear", "single_transformer_blocks.{}.norm.linear"),
    (
        "single_blocks.{}.linear1",
        (
            "single_transformer_blocks.{}.attn.to_q",
            "single_transformer_blocks.{}.attn.to_k",
            "single_transformer_blocks.{}.attn.to_v",
            ("single_transformer_blocks.{}.proj_mlp", 4),
        ),
    ),
    ("single_blocks.{}.q_norm", "single_transformer_blocks.{}.attn.norm_q"),
    ("single_blocks.{}.k_norm", "single_transformer_blocks.{}.attn.norm_k"),
    ("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out"),
)
FINAL_LAYER: tuple[Row, ...] = (
    # (shift, scale) in the checkpoint, (scale, shift) in diffusers.
    ("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
    ("final_layer.linear", "proj_out"),
)

_ROWS: tuple[Row, ...] = (
    *EMBEDDERS,
    ("time_in.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.mlp.0", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.mlp.2", "time_text_embed.guidance_embedder.linear_2"),
    *STREAMS,
    *FUSED,
    *FINAL_LAYER,
    # FramePack: the frames before, at three resolutions, and the first frame as SigLIP sees it.
    *same(
        "clean_x_embedder.proj",
        "clean_x_embedder.proj_2x",
        "clean_x_embedder.proj_4x",
        "image_projection.up",
        "image_projection.down",
    ),
)

PREFIXES = {
    "kohya": ("lora_unet_",),
    "diffusers": ("transformer.",),
    "peft": ("base_model.model.",),
    "comfy": ("diffusion_model.",),
    "lycoris": ("lycoris_", "lora_unet_"),
    "onetrainer": ("lora_transformer_", "lora_unet_"),
    "ai-toolkit": ("diffusion_model.",),
    "musubi": ("lora_unet_",),
    "checkpoint": ("model.diffusion_model.", "model.model."),
}

# What tells fused weights from those of relatives with other MLPs, at any size.
FUSED_PROPORTIONS = (
    Proportion(("img_attn_qkv", "txt_attn_qkv"), 3, 1),
    Proportion(("img_mlp.fc1", "txt_mlp.fc1"), 4, 1),
    Proportion(("linear1",), 7, 1),
    Proportion(("linear2",), 1, 5),
)
BLOCKS = (
    Block("D", "denoiser", "double_blocks.{}"),
    Block("S", "denoiser", "single_blocks.{}"),
)

ARCH = Arch(
    name="hunyuan_video",
    title="Hunyuan Video",
    components=(
        Component("denoiser", PREFIXES, Table(_ROWS), kohya_dialect=NATIVE, dialects={"ai-toolkit": NATIVE}),
        # The first text encoder is a Llama, which only OneTrainer adapts.
        Component(
            "text_encoder_2",
            {
                "kohya": ("lora_te2_",),
                "diffusers": ("text_encoder_2.",),
                "comfy": ("text_encoders.clip_l.transformer.",),
                "lycoris": ("lora_te2_",),
                "onetrainer": ("lora_te2_",),
                "checkpoint": ("text_encoders.clip_l.transformer.",),
            },
            CLIP,
            kohya_dialect=DIFFUSERS,
        ),
    ),
    kohya_versions=("hunyuan_video", "framepack"),
    modelspec=("hunyuan-video", "framepack"),
    base_models=("hunyuanvideo", "hunyuan-video", "framepack", "skyreels-v1"),
    widths=(
        Width("denoiser", ("img_attn_qkv", "txt_attn_qkv", "linear1"), 3072),
        Width("text_encoder_2", CLIP_READS_HIDDEN, 768),
    ),
    proportions=FUSED_PROPORTIONS,
    depths={"double_blocks": 20, "single_blocks": 40},
    derived_from="flux",
    blocks=(*BLOCKS, Block("CLIP", "text_encoder_2")),
)
