"""Qwen-Image: a transformer of double stream blocks, which all files name as diffusers does, and Qwen2.5-VL."""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._table import DIFFUSERS, NATIVE, Component, Row, Table, same

_ROWS = same(
    "img_in",
    "txt_in",
    "txt_norm",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "transformer_blocks.{}.img_mod.1",
    "transformer_blocks.{}.txt_mod.1",
    "transformer_blocks.{}.attn.to_q",
    "transformer_blocks.{}.attn.to_k",
    "transformer_blocks.{}.attn.to_v",
    "transformer_blocks.{}.attn.to_out.0",
    "transformer_blocks.{}.attn.norm_q",
    "transformer_blocks.{}.attn.norm_k",
    "transformer_blocks.{}.attn.add_q_proj",
    "transformer_blocks.{}.attn.add_k_proj",
    "transformer_blocks.{}.attn.add_v_proj",
    "transformer_blocks.{}.attn.to_add_out",
    "transformer_blocks.{}.attn.norm_added_q",
    "transformer_blocks.{}.attn.norm_added_k",
    "transformer_blocks.{}.img_mlp.net.0.proj",
    "transformer_blocks.{}.img_mlp.net.2",
    "transformer_blocks.{}.txt_mlp.net.0.proj",
    "transformer_blocks.{}.txt_mlp.net.2",
    "norm_out.linear",
    "proj_out",
)

# The published checkpoint has no level for the language model beside the vision tower; transformers gave it one.
_QWEN2_5_VL: tuple[Row, ...] = tuple(
    (f"model.{name}", f"model.language_model.{name}")
    for name in (
        "embed_tokens",
        "layers.{}.input_layernorm",
        "layers.{}.self_attn.q_proj",
        "layers.{}.self_attn.k_proj",
        "layers.{}.self_attn.v_proj",
        "layers.{}.self_attn.o_proj",
        "layers.{}.post_attention_layernorm",
        "layers.{}.mlp.gate_proj",
        "layers.{}.mlp.up_proj",
        "layers.{}.mlp.down_proj",
        "norm",
    )
)

_READS_HIDDEN = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)

ARCH = Arch(
    name="qwen_image",
    title="Qwen-Image",
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
                "ai-toolkit": ("diffusion_model.",),
                "musubi": ("lora_unet_",),
                "checkpoint": ("model.diffusion_model.",),
            },
            Table(_ROWS),
            kohya_dialect=NATIVE,
        ),
        Component(
            "text_encoder",
            {
                "kohya": ("lora_te_",),
                "diffusers": ("text_encoder.",),
                "comfy": ("text_encoders.qwen25_7b.transformer.",),
                "onetrainer": ("lora_te_",),
                "checkpoint": ("text_encoders.qwen25_7b.transformer.",),
            },
            Table(_QWEN2_5_VL),
            kohya_dialect=DIFFUSERS,
        ),
    ),
    kohya_versions=("qwen_image", "qwen_image_edit", "qwen_image_layered"),
    base_models=("qwen-image",),
    # Attention alone, of its first blocks, may as well be Flux.1's or Hunyuan Video's: only metadata tells.
    widths=(
        Width(
            "denoiser",
            (
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
                "attn.add_q_proj",
                "attn.add_k_proj",
                "attn.add_v_proj",
            ),
            3072,
        ),
        Width("text_encoder", _READS_HIDDEN, 3584),
    ),
    depths={"transformer_blocks": 60},
)
