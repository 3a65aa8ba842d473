"""HiDream I1: a transformer of double and single stream blocks with experts, which all files name alike.

Four text encoders: CLIP ViT-L/14 and OpenCLIP bigG/14, both in Hugging Face's names, T5-XXL and Llama 3.1 (8B).
diffusers loads adapters of the transformer alone.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._clip import CLIP, CLIP_READS_HIDDEN
from loratools.archs._t5 import T5_ENCODER
from loratools.archs._table import DIFFUSERS, NATIVE, Component, Row, Table, same

# Double stream blocks have a second set of projections, and a plain feed-forward, for the prompt.
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out", "q_rms_norm", "k_rms_norm")


def _block(stack: str) -> tuple[Row, ...]:
    block = f"{stack}.{{}}.block"
    return same(
        f"{block}.adaLN_modulation.1",
        *(f"{block}.attn1.{name}" for name in _PROJECTIONS),
        *(f"{block}.ff_i.shared_experts.{name}" for name in ("w1", "w2", "w3")),
        *(f"{block}.ff_i.experts.{{}}.{name}" for name in ("w1", "w2", "w3")),
        f"{block}.ff_i.gate",
    )


_ROWS: tuple[Row, ...] = (
    *same(
        "x_embedder.proj",
        "t_embedder.timestep_embedder.linear_1",
        "t_embedder.timestep_embedder.linear_2",
        "p_embedder.pooled_embedder.linear_1",
        "p_embedder.pooled_embedder.linear_2",
        "caption_projection.{}.linear",
    ),
    *_block("double_stream_blocks"),
    *same(
        *(f"double_stream_blocks.{{}}.block.attn1.{name}_t" for name in _PROJECTIONS),
        *(f"double_stream_blocks.{{}}.block.ff_t.{name}" for name in ("w1", "w2", "w3")),
    ),
    *_block("single_stream_blocks"),
    *same("final_layer.linear", "final_layer.adaLN_modulation.1"),
)

_LLAMA = same(
    "model.embed_tokens",
    "model.layers.{}.input_layernorm",
    "model.layers.{}.self_attn.q_proj",
    "model.layers.{}.self_attn.k_proj",
    "model.layers.{}.self_attn.v_proj",
    "model.layers.{}.self_attn.o_proj",
    "model.layers.{}.post_attention_layernorm",
    "model.layers.{}.mlp.gate_proj",
    "model.layers.{}.mlp.up_proj",
    "model.layers.{}.mlp.down_proj",
    "model.norm",
    "lm_head",
)


def _encoder(number: int, place: str, table: Table) -> Component:
    name = "text_encoder" if number == 1 else f"text_encoder_{number}"
    flat, dotted = (f"lora_te{number}_",), (f"text_encoders.{place}.transformer.",)
    prefixes = {"kohya": flat, "comfy": dotted, "lycoris": flat, "onetrainer": flat, "checkpoint": dotted}
    return Component(name, prefixes, table, kohya_dialect=DIFFUSERS)


ARCH = Arch(
    name="hidream",
    title="HiDream",
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
                "checkpoint": ("model.diffusion_model.",),
            },
            Table(_ROWS),
            kohya_dialect=NATIVE,
        ),
        _encoder(1, "clip_l", CLIP),
        _encoder(2, "clip_g", CLIP),
        _encoder(3, "t5xxl", T5_ENCODER),
        _encoder(4, "llama", Table(_LLAMA)),
    ),
    base_models=("hidream",),
    widths=(
        Width("text_encoder", CLIP_READS_HIDDEN, 768),
        Width("text_encoder_2", CLIP_READS_HIDDEN, 1280),
        Width("text_encoder_3", ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"), 4096),
        Width("text_encoder_4", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 4096),
    ),
    # Its first three encoders are those of Stable Diffusion 3.
    derived_from="sd3",
)
