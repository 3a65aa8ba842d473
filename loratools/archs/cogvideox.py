"""CogVideoX 2B, 5B and 1.5: joint attention to text and video, and a T5 that nobody trains.

The checkpoints' names are SwissArmyTransformer's.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._table import NATIVE, Component, Row, Table
from loratools.model import Rows

# One modulation for both norms of a block: (shift, scale, gate) of the video for the first norm and for the
# second, then the same of the text.
_FIRST_NORM = Rows(((0, 1), (2, 3)), of=4)
_SECOND_NORM = Rows(((1, 2), (3, 4)), of=4)

_ROWS: tuple[Row, ...] = (
    ("mixins.patch_embed.proj", "patch_embed.proj"),
    ("mixins.patch_embed.text_proj", "patch_embed.text_proj"),
    ("mixins.pos_embed.pos_embedding", "patch_embed.pos_embedding"),
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    # Only in the image-to-video model of 1.5.
    ("ofs_embed.0", "ofs_embedding.linear_1"),
    ("ofs_embed.2", "ofs_embedding.linear_2"),
    (
        "mixins.adaln_layer.adaLN_modulations.{}.1",
        (
            ("transformer_blocks.{}.norm1.linear", _FIRST_NORM),
            ("transformer_blocks.{}.norm2.linear", _SECOND_NORM),
        ),
    ),
    ("mixins.adaln_layer.query_layernorm_list.{}", "transformer_blocks.{}.attn1.norm_q"),
    ("mixins.adaln_layer.key_layernorm_list.{}", "transformer_blocks.{}.attn1.norm_k"),
    ("transformer.layers.{}.input_layernorm", "transformer_blocks.{}.norm1.norm"),
    (
        "transformer.layers.{}.attention.query_key_value",
        (
            "transformer_blocks.{}.attn1.to_q",
            "transformer_blocks.{}.attn1.to_k",
            "transformer_blocks.{}.attn1.to_v",
        ),
    ),
    ("transformer.layers.{}.attention.dense", "transformer_blocks.{}.attn1.to_out.0"),
    ("transformer.layers.{}.post_attention_layernorm", "transformer_blocks.{}.norm2.norm"),
    ("transformer.layers.{}.mlp.dense_h_to_4h", "transformer_blocks.{}.ff.net.0.proj"),
    ("transformer.layers.{}.mlp.dense_4h_to_h", "transformer_blocks.{}.ff.net.2"),
    ("transformer.final_layernorm", "norm_final"),
    ("mixins.final_layer.norm_final", "norm_out.norm"),
    ("mixins.final_layer.adaLN_modulation.1", "norm_out.linear"),
    ("mixins.final_layer.linear", "proj_out"),
)

_READS_HIDDEN = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h")

ARCH = Arch(
    name="cogvideox",
    title="CogVideoX",
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
    base_models=("cogvideox", "cogvideo"),
    # PixArt, Sana and LTX-Video spell their attention alike. The two sizes are 5B's and 2B's.
    widths=(
        Width("denoiser", _READS_HIDDEN, 3072),
        Width("denoiser", _READS_HIDDEN, 1920),
    ),
)
