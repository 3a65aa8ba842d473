"""Anima: the transformer of Cosmos Predict 2, a small conditioner of its prompts, and Qwen3 (0.6B).

The checkpoint holds the conditioner as ``llm_adapter`` inside the transformer; diffusers has it as a model of its own.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._table import NATIVE, Component, Row, Table, same

_ROWS: tuple[Row, ...] = (
    ("x_embedder.proj.1", "patch_embed.proj"),
    ("t_embedder.1.linear_1", "time_embed.t_embedder.linear_1"),
    ("t_embedder.1.linear_2", "time_embed.t_embedder.linear_2"),
    ("t_embedding_norm", "time_embed.norm"),
    ("blocks.{}.adaln_modulation_self_attn.1", "transformer_blocks.{}.norm1.linear_1"),
    ("blocks.{}.adaln_modulation_self_attn.2", "transformer_blocks.{}.norm1.linear_2"),
    ("blocks.{}.self_attn.q_proj", "transformer_blocks.{}.attn1.to_q"),
    ("blocks.{}.self_attn.k_proj", "transformer_blocks.{}.attn1.to_k"),
    ("blocks.{}.self_attn.v_proj", "transformer_blocks.{}.attn1.to_v"),
    ("blocks.{}.self_attn.output_proj", "transformer_blocks.{}.attn1.to_out.0"),
    ("blocks.{}.self_attn.q_norm", "transformer_blocks.{}.attn1.norm_q"),
    ("blocks.{}.self_attn.k_norm", "transformer_blocks.{}.attn1.norm_k"),
    ("blocks.{}.adaln_modulation_cross_attn.1", "transformer_blocks.{}.norm2.linear_1"),
    ("blocks.{}.adaln_modulation_cross_attn.2", "transformer_blocks.{}.norm2.linear_2"),
    ("blocks.{}.cross_attn.q_proj", "transformer_blocks.{}.attn2.to_q"),
    ("blocks.{}.cross_attn.k_proj", "transformer_blocks.{}.attn2.to_k"),
    ("blocks.{}.cross_attn.v_proj", "transformer_blocks.{}.attn2.to_v"),
    ("blocks.{}.cross_attn.output_proj", "transformer_blocks.{}.attn2.to_out.0"),
    ("blocks.{}.cross_attn.q_norm", "transformer_blocks.{}.attn2.norm_q"),
    ("blocks.{}.cross_attn.k_norm", "transformer_blocks.{}.attn2.norm_k"),
    ("blocks.{}.adaln_modulation_mlp.1", "transformer_blocks.{}.norm3.linear_1"),
    ("blocks.{}.adaln_modulation_mlp.2", "transformer_blocks.{}.norm3.linear_2"),
    ("blocks.{}.mlp.layer1", "transformer_blocks.{}.ff.net.0.proj"),
    ("blocks.{}.mlp.layer2", "transformer_blocks.{}.ff.net.2"),
    ("final_layer.adaln_modulation.1", "norm_out.linear_1"),
    ("final_layer.adaln_modulation.2", "norm_out.linear_2"),
    ("final_layer.linear", "proj_out"),
)

_READS_HIDDEN = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "cross_attn.q_proj",
    "mlp.layer1",
)

_CONDITIONER = same(
    "embed",
    "blocks.{}.norm_self_attn",
    "blocks.{}.self_attn.q_proj",
    "blocks.{}.self_attn.k_proj",
    "blocks.{}.self_attn.v_proj",
    "blocks.{}.self_attn.o_proj",
    "blocks.{}.self_attn.q_norm",
    "blocks.{}.self_attn.k_norm",
    "blocks.{}.norm_cross_attn",
    "blocks.{}.cross_attn.q_proj",
    "blocks.{}.cross_attn.k_proj",
    "blocks.{}.cross_attn.v_proj",
    "blocks.{}.cross_attn.o_proj",
    "blocks.{}.cross_attn.q_norm",
    "blocks.{}.cross_attn.k_norm",
    "blocks.{}.norm_mlp",
    "blocks.{}.mlp.0",
    "blocks.{}.mlp.2",
    "out_proj",
    "norm",
)

_QWEN3 = same(
    "embed_tokens",
    "layers.{}.input_layernorm",
    "layers.{}.self_attn.q_proj",
    "layers.{}.self_attn.k_proj",
    "layers.{}.self_attn.v_proj",
    "layers.{}.self_attn.o_proj",
    "layers.{}.self_attn.q_norm",
    "layers.{}.self_attn.k_norm",
    "layers.{}.post_attention_layernorm",
    "layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up_proj",
    "layers.{}.mlp.down_proj",
    "norm",
)
_QWEN3_READS_HIDDEN = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)

ARCH = Arch(
    name="anima",
    title="Anima",
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
                "checkpoint": ("model.diffusion_model.", "net."),
            },
            Table(_ROWS),
            kohya_dialect=NATIVE,
            dialects={"ai-toolkit": NATIVE},
        ),
        Component(
            "text_conditioner",
            {
                "kohya": ("lora_unet_llm_adapter_",),
                "diffusers": ("text_conditioner.",),
                "peft": ("base_model.model.llm_adapter.",),
                "comfy": ("diffusion_model.llm_adapter.",),
                "lycoris": ("lycoris_llm_adapter_", "lora_unet_llm_adapter_"),
                "onetrainer": ("lora_transformer_llm_adapter_", "lora_unet_llm_adapter_"),
                "ai-toolkit": ("diffusion_model.llm_adapter.",),
                "checkpoint": ("model.diffusion_model.llm_adapter.", "net.llm_adapter.", "llm_adapter."),
            },
            Table(_CONDITIONER),
            kohya_dialect=NATIVE,
        ),
        Component(
            "text_encoder",
            {
                "kohya": ("lora_te_",),
                "diffusers": ("text_encoder.",),
                "comfy": ("text_encoders.qwen3_06b.transformer.model.",),
                "lycoris": ("lora_te_",),
                "onetrainer": ("lora_te_",),
                "checkpoint": ("text_encoders.qwen3_06b.transformer.model.",),
            },
            Table(_QWEN3),
            kohya_dialect=NATIVE,
        ),
    ),
    kohya_versions=("anima",),
    modelspec=("anima-preview",),
    base_models=("circlestone-labs-anima", "anima-preview"),
    # CogVideoX and LTX-Video spell their blocks alike in diffusers. The conditioned prompt keeps its own width;
    # LTX-Video's has the model's.
    widths=(
        Width("denoiser", _READS_HIDDEN, 2048),
        Width("denoiser", ("cross_attn.k_proj", "cross_attn.v_proj"), 1024),
        Width("text_encoder", _QWEN3_READS_HIDDEN, 1024),
    ),
)
