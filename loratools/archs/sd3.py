"""Stable Diffusion 3 Medium and 3.5 Medium: 24 joint blocks of two streams, CLIP-L, CLIP-G and T5-XXL.

The text stream ends with the last block, whose adaptive norm has but a shift and a scale for it: diffusers stores
them the other way round there, and there alone. So 3.5 Large, which has more blocks, is an architecture of its own.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Proportion, Width
from loratools.archs._clip import CLIP, CLIP_READS_HIDDEN
from loratools.archs._t5 import T5_ENCODER
from loratools.archs._table import DIFFUSERS, NATIVE, Component, Row, Table, same, swapped

_X_BLOCK = "joint_blocks.{}.x_block"
_CONTEXT_BLOCK = "joint_blocks.{}.context_block"
_TWIN = "transformer_blocks.{}"

_ROWS: tuple[Row, ...] = (
    ("pos_embed", "pos_embed.pos_embed"),
    ("x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    *same("context_embedder"),
    (f"{_X_BLOCK}.adaLN_modulation.1", f"{_TWIN}.norm1.linear"),
    (f"{_X_BLOCK}.attn.qkv", (f"{_TWIN}.attn.to_q", f"{_TWIN}.attn.to_k", f"{_TWIN}.attn.to_v")),
    (f"{_X_BLOCK}.attn.ln_q", f"{_TWIN}.attn.norm_q"),
    (f"{_X_BLOCK}.attn.ln_k", f"{_TWIN}.attn.norm_k"),
    (f"{_X_BLOCK}.attn.proj", f"{_TWIN}.attn.to_out.0"),
    # 3.5 Medium: a second attention, of the image alone, in the blocks 0 to 12.
    (f"{_X_BLOCK}.attn2.qkv", (f"{_TWIN}.attn2.to_q", f"{_TWIN}.attn2.to_k", f"{_TWIN}.attn2.to_v")),
    (f"{_X_BLOCK}.attn2.ln_q", f"{_TWIN}.attn2.norm_q"),
    (f"{_X_BLOCK}.attn2.ln_k", f"{_TWIN}.attn2.norm_k"),
    (f"{_X_BLOCK}.attn2.proj", f"{_TWIN}.attn2.to_out.0"),
    (f"{_X_BLOCK}.mlp.fc1", f"{_TWIN}.ff.net.0.proj"),
    (f"{_X_BLOCK}.mlp.fc2", f"{_TWIN}.ff.net.2"),
    (f"{_CONTEXT_BLOCK}.adaLN_modulation.1", f"{_TWIN}.norm1_context.linear"),
    (
        f"{_CONTEXT_BLOCK}.attn.qkv",
        (f"{_TWIN}.attn.add_q_proj", f"{_TWIN}.attn.add_k_proj", f"{_TWIN}.attn.add_v_proj"),
    ),
    (f"{_CONTEXT_BLOCK}.attn.ln_q", f"{_TWIN}.attn.norm_added_q"),
    (f"{_CONTEXT_BLOCK}.attn.ln_k", f"{_TWIN}.attn.norm_added_k"),
    (f"{_CONTEXT_BLOCK}.attn.proj", f"{_TWIN}.attn.to_add_out"),
    (f"{_CONTEXT_BLOCK}.mlp.fc1", f"{_TWIN}.ff_context.net.0.proj"),
    (f"{_CONTEXT_BLOCK}.mlp.fc2", f"{_TWIN}.ff_context.net.2"),
    # (shift, scale) in the checkpoint, (scale, shift) in diffusers.
    ("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
    ("final_layer.linear", "proj_out"),
)


def mmdit(blocks: int) -> Table:
    """The denoiser's names, for a model of so many joint blocks."""
    last = blocks - 1
    context_norm: Row = (
        f"joint_blocks.{last}.context_block.adaLN_modulation.1",
        swapped(f"transformer_blocks.{last}.norm1_context.linear"),
    )
    return Table((*_ROWS, context_norm))


# Both CLIPs keep their projection, and Hugging Face's names, in the checkpoint.
_PROJECTION = same("text_projection")
_CLIP = Table(
    (*CLIP.rows, *_PROJECTION),
    {dialect: (*rows, *_PROJECTION) for dialect, rows in CLIP.further.items()},
)

PREFIXES = {
    "kohya": ("lora_unet_",),
    "diffusers": ("transformer.",),
    "peft": ("base_model.model.",),
    "comfy": ("diffusion_model.",),
    "lycoris": ("lycoris_", "lora_unet_"),
    "onetrainer": ("lora_transformer_", "lora_unet_"),
    "ai-toolkit": ("transformer.",),
    "checkpoint": ("model.diffusion_model.",),
}

TEXT_ENCODERS = (
    Component(
        "text_encoder",
        {
            "kohya": ("lora_te1_",),
            "diffusers": ("text_encoder.",),
            "peft": ("base_model.model.",),
            "comfy": ("text_encoders.clip_l.transformer.",),
            "lycoris": ("lora_te1_",),
            "onetrainer": ("lora_te1_",),
            "checkpoint": ("text_encoders.clip_l.transformer.",),
        },
        _CLIP,
        kohya_dialect=DIFFUSERS,
    ),
    Component(
        "text_encoder_2",
        {
            "kohya": ("lora_te2_",),
            "diffusers": ("text_encoder_2.",),
            "comfy": ("text_encoders.clip_g.transformer.",),
            "lycoris": ("lora_te2_",),
            "onetrainer": ("lora_te2_",),
            "checkpoint": ("text_encoders.clip_g.transformer.",),
        },
        _CLIP,
        kohya_dialect=DIFFUSERS,
    ),
    Component(
        "text_encoder_3",
        {
            "kohya": ("lora_te3_",),
            "diffusers": ("text_encoder_3.",),
            "peft": ("base_model.model.",),
            "comfy": ("text_encoders.t5xxl.transformer.",),
            "lycoris": ("lora_te3_",),
            "onetrainer": ("lora_te3_",),
            "checkpoint": ("text_encoders.t5xxl.transformer.",),
        },
        T5_ENCODER,
        kohya_dialect=DIFFUSERS,
    ),
)

# Where the denoiser's matrices read the hidden state: their input width is the model's.
READS_HIDDEN = (
    "x_block.attn.qkv",
    "x_block.attn.proj",
    "x_block.attn2.qkv",
    "x_block.attn2.proj",
    "x_block.mlp.fc1",
    "context_block.attn.qkv",
    "context_block.attn.proj",
    "context_block.mlp.fc1",
)
TEXT_WIDTHS = (
    Width("text_encoder", CLIP_READS_HIDDEN, 768),
    Width("text_encoder_2", CLIP_READS_HIDDEN, 1280),
    Width("text_encoder_3", ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"), 4096),
)
PROPORTIONS = (
    Proportion(("attn.qkv", "attn2.qkv"), 3, 1),
    Proportion(("mlp.fc1",), 4, 1),
    Proportion(("mlp.fc2",), 1, 4),
)

_BLOCKS = 24

ARCH = Arch(
    name="sd3",
    title="Stable Diffusion 3 Medium and 3.5 Medium",
    components=(Component("denoiser", PREFIXES, mmdit(_BLOCKS), kohya_dialect=NATIVE), *TEXT_ENCODERS),
    kohya_versions=("3-medium", "3-5-medium"),
    modelspec=("stable-diffusion-3-m", "stable-diffusion-3-medium", "stable-diffusion-3-5-medium"),
    base_models=("stable-diffusion-3", "sd3"),
    widths=(Width("denoiser", READS_HIDDEN, 1536), *TEXT_WIDTHS),
    proportions=PROPORTIONS,
    depths={"joint_blocks": _BLOCKS},
    # Its two CLIPs are SDXL's: files of theirs alone are more often made for that.
    derived_from="sdxl",
)
