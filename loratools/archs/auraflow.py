"""AuraFlow: four double-stream blocks, then single-stream ones, and a UMT5 encoder that nobody trains."""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._table import NATIVE, Component, Row, Table, swapped

# In double layers 1 is the text's stream ("C", the condition) and 2 the image's ("X"); single layers have only 1.
_ROWS: tuple[Row, ...] = (
    ("init_x_linear", "pos_embed.proj"),
    ("positional_encoding", "pos_embed.pos_embed"),
    ("register_tokens", None),
    ("cond_seq_linear", "context_embedder"),
    ("t_embedder.mlp.0", "time_step_proj.linear_1"),
    ("t_embedder.mlp.2", "time_step_proj.linear_2"),
    ("double_layers.{}.modX.1", "joint_transformer_blocks.{}.norm1.linear"),
    ("double_layers.{}.modC.1", "joint_transformer_blocks.{}.norm1_context.linear"),
    ("double_layers.{}.attn.w2q", "joint_transformer_blocks.{}.attn.to_q"),
    ("double_layers.{}.attn.w2k", "joint_transformer_blocks.{}.attn.to_k"),
    ("double_layers.{}.attn.w2v", "joint_transformer_blocks.{}.attn.to_v"),
    ("double_layers.{}.attn.w2o", "joint_transformer_blocks.{}.attn.to_out.0"),
    ("double_layers.{}.attn.w1q", "joint_transformer_blocks.{}.attn.add_q_proj"),
    ("double_layers.{}.attn.w1k", "joint_transformer_blocks.{}.attn.add_k_proj"),
    ("double_layers.{}.attn.w1v", "joint_transformer_blocks.{}.attn.add_v_proj"),
    ("double_layers.{}.attn.w1o", "joint_transformer_blocks.{}.attn.to_add_out"),
    ("double_layers.{}.mlpX.c_fc1", "joint_transformer_blocks.{}.ff.linear_1"),
    ("double_layers.{}.mlpX.c_fc2", "joint_transformer_blocks.{}.ff.linear_2"),
    ("double_layers.{}.mlpX.c_proj", "joint_transformer_blocks.{}.ff.out_projection"),
    ("double_layers.{}.mlpC.c_fc1", "joint_transformer_blocks.{}.ff_context.linear_1"),
    ("double_layers.{}.mlpC.c_fc2", "joint_transformer_blocks.{}.ff_context.linear_2"),
    ("double_layers.{}.mlpC.c_proj", "joint_transformer_blocks.{}.ff_context.out_projection"),
    ("single_layers.{}.modCX.1", "single_transformer_blocks.{}.norm1.linear"),
    ("single_layers.{}.attn.w1q", "single_transformer_blocks.{}.attn.to_q"),
    ("single_layers.{}.attn.w1k", "single_transformer_blocks.{}.attn.to_k"),
    ("single_layers.{}.attn.w1v", "single_transformer_blocks.{}.attn.to_v"),
    ("single_layers.{}.attn.w1o", "single_transformer_blocks.{}.attn.to_out.0"),
    ("single_layers.{}.mlp.c_fc1", "single_transformer_blocks.{}.ff.linear_1"),
    ("single_layers.{}.mlp.c_fc2", "single_transformer_blocks.{}.ff.linear_2"),
    ("single_layers.{}.mlp.c_proj", "single_transformer_blocks.{}.ff.out_projection"),
    # (shift, scale) in the checkpoint, (scale, shift) in diffusers.
    ("modF.1", swapped("norm_out.linear")),
    ("final_linear", "proj_out"),
)

ARCH = Arch(
    name="auraflow",
    title="AuraFlow",
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
                "checkpoint": ("model.diffusion_model.",),
            },
            Table(_ROWS),
            kohya_dialect=NATIVE,
        ),
    ),
    base_models=("auraflow", "aura-flow"),
    # Flux.1 and Flux.3 spell the attention of diffusers' single blocks alike, at the same width.
    widths=(Width("denoiser", ("attn.w1q", "attn.w1k", "attn.w1v", "attn.w1o"), 3072),),
    depths={"double_layers": 4, "single_layers": 32},
)
