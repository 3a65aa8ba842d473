"""Flux.1: a transformer of double and single stream blocks, CLIP ViT-L/14 and T5-XXL."""

from __future__ import annotations

from loratools.archs._arch import Arch, Proportion, Width
from loratools.archs._blocks import FLUX_BLOCKS, FLUX_VECTORS
from loratools.archs._clip import CLIP, CLIP_READS_HIDDEN
from loratools.archs._t5 import T5_ENCODER
from loratools.archs._table import DIFFUSERS, NATIVE, Component, Row, Table, swapped
from loratools.model import Rows

_ROWS: tuple[Row, ...] = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ("double_blocks.{}.img_mod.lin", "transformer_blocks.{}.norm1.linear"),
    (
        "double_blocks.{}.img_attn.qkv",
        (
            "transformer_blocks.{}.attn.to_q",
            "transformer_blocks.{}.attn.to_k",
            "transformer_blocks.{}.attn.to_v",
        ),
    ),
    ("double_blocks.{}.img_attn.norm.query_norm", "transformer_blocks.{}.attn.norm_q"),
    ("double_blocks.{}.img_attn.norm.key_norm", "transformer_blocks.{}.attn.norm_k"),
    ("double_blocks.{}.img_attn.proj", "transformer_blocks.{}.attn.to_out.0"),
    ("double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.net.0.proj"),
    ("double_blocks.{}.img_mlp.2", "transformer_blocks.{}.ff.net.2"),
    ("double_blocks.{}.txt_mod.lin", "transformer_blocks.{}.norm1_context.linear"),
    (
        "double_blocks.{}.txt_attn.qkv",
        (
            "transformer_blocks.{}.attn.add_q_proj",
            "transformer_blocks.{}.attn.add_k_proj",
            "transformer_blocks.{}.attn.add_v_proj",
        ),
    ),
    ("double_blocks.{}.txt_attn.norm.query_norm", "transformer_blocks.{}.attn.norm_added_q"),
    ("double_blocks.{}.txt_attn.norm.key_norm", "transformer_blocks.{}.attn.norm_added_k"),
    ("double_blocks.{}.txt_attn.proj", "transformer_blocks.{}.attn.to_add_out"),
    ("double_blocks.{}.txt_mlp.0", "transformer_blocks.{}.ff_context.net.0.proj"),
    ("double_blocks.{}.txt_mlp.2", "transformer_blocks.{}.ff_context.net.2"),
    ("single_blocks.{}.modulation.lin", "single_transformer_blocks.{}.norm.linear"),
    (
        "single_blocks.{}.linear1",
        (
            "single_transformer_blocks.{}.attn.to_q",
            "single_transformer_blocks.{}.attn.to_k",
            "single_transformer_blocks.{}.attn.to_v",
            ("single_transformer_blocks.{}.proj_mlp", 4),
        ),
    ),
    ("single_blocks.{}.norm.query_norm", "single_transformer_blocks.{}.attn.norm_q"),
    ("single_blocks.{}.norm.key_norm", "single_transformer_blocks.{}.attn.norm_k"),
    ("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out"),
    # (shift, scale) in the checkpoint, (scale, shift) in diffusers.
    ("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
    ("final_layer.linear", "proj_out"),
)

# XLabs' attention processors: 1 for the image's stream, 2 for the text's, none in single blocks.
_XLABS: tuple[Row, ...] = (
    ("double_blocks.{}.img_attn.qkv", "double_blocks.{}.processor.qkv_lora1"),
    ("double_blocks.{}.img_attn.proj", "double_blocks.{}.processor.proj_lora1"),
    ("double_blocks.{}.txt_attn.qkv", "double_blocks.{}.processor.qkv_lora2"),
    ("double_blocks.{}.txt_attn.proj", "double_blocks.{}.processor.proj_lora2"),
    # The rows of q, k and v; those of the MLP have no name.
    ("single_blocks.{}.linear1", (("single_blocks.{}.processor.qkv_lora", Rows(((0, 3),), of=7)),)),
    ("single_blocks.{}.linear2", "single_blocks.{}.processor.proj_lora"),
)

ARCH = Arch(
    name="flux",
    title="Flux.1",
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
                "ai-toolkit": ("transformer.",),
                "musubi": ("lora_unet_",),
                "xlabs": ("",),
                "checkpoint": ("model.diffusion_model.",),
            },
            Table(_ROWS, {"xlabs": _XLABS}),
            kohya_dialect=NATIVE,
            dialects={"xlabs": "xlabs"},
        ),
        Component(
            "text_encoder",
            {
                "kohya": ("lora_te1_", "lora_te_"),
                "diffusers": ("text_encoder.",),
                "peft": ("base_model.model.",),
                "comfy": ("text_encoders.clip_l.transformer.",),
                "lycoris": ("lora_te1_",),
                "onetrainer": ("lora_te1_",),
                "checkpoint": ("text_encoders.clip_l.transformer.",),
            },
            CLIP,
            kohya_dialect=DIFFUSERS,
        ),
        Component(
            "text_encoder_2",
            {
                # sd-scripts counts the T5 as the third encoder, as in SD3; OneTrainer as the second.
                "kohya": ("lora_te3_", "lora_te2_"),
                "diffusers": ("text_encoder_2.",),
                "comfy": ("text_encoders.t5xxl.transformer.",),
                "lycoris": ("lora_te3_",),
                "onetrainer": ("lora_te2_",),
                "checkpoint": ("text_encoders.t5xxl.transformer.",),
            },
            T5_ENCODER,
            kohya_dialect=DIFFUSERS,
        ),
    ),
    kohya_versions=("flux1", "flux.1", "flux1-dev", "flux1-schnell", "flux_kontext"),
    modelspec=("flux-1-dev", "flux-1-schnell", "flux.1-dev", "flux.1-schnell", "flux-1-dev-kontext"),
    base_models=("flux-1", "flux1", "flux"),
    widths=(
        Width("denoiser", ("img_attn.qkv", "txt_attn.qkv", "linear1"), 3072),
        Width("text_encoder", CLIP_READS_HIDDEN, 768),
        Width("text_encoder_2", ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"), 4096),
    ),
    # Flux.2 has gated MLPs and another width under the same names, FramePack two more blocks of each kind.
    proportions=(
        Proportion(("img_attn.qkv", "txt_attn.qkv"), 3, 1),
        Proportion(("img_mlp.0", "txt_mlp.0"), 4, 1),
        Proportion(("linear1",), 7, 1),
        Proportion(("linear2",), 1, 5),
    ),
    depths={"double_blocks": 19, "single_blocks": 38},
    # Chroma, Flux.2, Hunyuan Video, Qwen-Image, Stable Diffusion 3.
    foreign=(
        "distilled_guidance_layer",
        "stream_modulation",
        "token_refiner",
        "mlp_fc1",
        "img_mlp",
        "img_mod",
        "txt_mod",
        "pos_embed",
        "attn2.to_",
        "attn2_to_",
    ),
    blocks=FLUX_BLOCKS,
    vectors=FLUX_VECTORS,
)
