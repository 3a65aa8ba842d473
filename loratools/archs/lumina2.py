"""Lumina Image 2.0: a transformer of single stream blocks with refiners for noise and prompt, and Gemma 2 (2B).

Three heads of q share one of k and v: q has three fifths of the fused rows.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._table import NATIVE, Component, Row, Table, same

# The refiner of the prompt is not modulated by the time: its norm has no linear layer beside it.
_STACKS = (("layers", "norm1.norm"), ("noise_refiner", "norm1.norm"), ("context_refiner", "norm1"))
_MODULATED = ("layers", "noise_refiner")


def _block(stack: str, first_norm: str) -> tuple[Row, ...]:
    return (
        (
            f"{stack}.{{}}.attention.qkv",
            (
                (f"{stack}.{{}}.attn.to_q", 3),
                (f"{stack}.{{}}.attn.to_k", 1),
                (f"{stack}.{{}}.attn.to_v", 1),
            ),
        ),
        (f"{stack}.{{}}.attention.q_norm", f"{stack}.{{}}.attn.norm_q"),
        (f"{stack}.{{}}.attention.k_norm", f"{stack}.{{}}.attn.norm_k"),
        (f"{stack}.{{}}.attention.out", f"{stack}.{{}}.attn.to_out.0"),
        (f"{stack}.{{}}.attention_norm1", f"{stack}.{{}}.{first_norm}"),
        (f"{stack}.{{}}.attention_norm2", f"{stack}.{{}}.norm2"),
        (f"{stack}.{{}}.feed_forward.w1", f"{stack}.{{}}.feed_forward.linear_1"),
        (f"{stack}.{{}}.feed_forward.w2", f"{stack}.{{}}.feed_forward.linear_2"),
        (f"{stack}.{{}}.feed_forward.w3", f"{stack}.{{}}.feed_forward.linear_3"),
        *same(f"{stack}.{{}}.ffn_norm1", f"{stack}.{{}}.ffn_norm2"),
    )


_ROWS: tuple[Row, ...] = (
    ("x_embedder", None),
    ("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
    ("cap_embedder.0", "time_caption_embed.caption_embedder.0"),
    ("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
    *(row for stack, first_norm in _STACKS for row in _block(stack, first_norm)),
    *((f"{stack}.{{}}.adaLN_modulation.1", f"{stack}.{{}}.norm1.linear") for stack in _MODULATED),
    ("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    ("final_layer.linear", "norm_out.linear_2"),
)

_GEMMA2 = same(
    "embed_tokens",
    "layers.{}.input_layernorm",
    "layers.{}.self_attn.q_proj",
    "layers.{}.self_attn.k_proj",
    "layers.{}.self_attn.v_proj",
    "layers.{}.self_attn.o_proj",
    "layers.{}.post_attention_layernorm",
    "layers.{}.pre_feedforward_layernorm",
    "layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up_proj",
    "layers.{}.mlp.down_proj",
    "layers.{}.post_feedforward_layernorm",
    "norm",
)
_READS_HIDDEN = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)

ARCH = Arch(
    name="lumina2",
    title="Lumina Image 2.0",
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
                # One of the models that ai-toolkit trained before it came to save native prefixes.
                "ai-toolkit": ("transformer.",),
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
                "comfy": ("text_encoders.gemma2_2b.transformer.model.",),
                "lycoris": ("lora_te_",),
                "onetrainer": ("lora_te_",),
                "checkpoint": ("text_encoders.gemma2_2b.transformer.model.",),
            },
            Table(_GEMMA2),
            kohya_dialect=NATIVE,
        ),
    ),
    kohya_versions=("lumina2",),
    modelspec=("lumina-2",),
    base_models=("lumina-image-2", "lumina2", "lumina-2"),
    # Z-Image and Ideogram 4 have such blocks at other widths.
    widths=(
        Width(
            "denoiser",
            ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w3"),
            2304,
        ),
        Width("text_encoder", _READS_HIDDEN, 2304),
    ),
)
