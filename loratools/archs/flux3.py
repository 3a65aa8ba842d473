"""Flux.3: early blocks of each mode's own (image, reference image, text), then single-stream blocks for all.

Source: the loaders of diffusers for checkpoints and adapters.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Width
from loratools.archs._table import NATIVE, Component, Row, Table, swapped

_ENDS: tuple[Row, ...] = (
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "timestep_embedder.linear_1"),
    ("time_in.out_layer", "timestep_embedder.linear_2"),
    # Only distilled models embed the time that a step jumps to.
    ("ref_time_in.in_layer", "target_timestep_embedder.linear_1"),
    ("ref_time_in.out_layer", "target_timestep_embedder.linear_2"),
    # (shift, scale) in the checkpoint, (scale, shift) in diffusers.
    ("final_layer.image.adaLN_modulation.1", swapped("norm_out.linear")),
    ("final_layer.image.linear", "proj_out"),
)
_MODES = ("image", "image_cond")
_MODULATIONS = ("early_stream_modulations", "single_stream_modulations")
_BLOCKS = (
    *((f"content_mode_blocks.{mode}.{{}}", f"mode_blocks.{mode}.{{}}") for mode in _MODES),
    # diffusers' loader of adapters renames these blocks whether or not a mode stands before the number.
    ("content_mode_blocks.{}", "mode_blocks.{}"),
    ("txt_mode_blocks.{}", "txt_mode_blocks.{}"),
    ("single_blocks.{}", "single_transformer_blocks.{}"),
)
_BLOCK = (
    ("q_proj", "attn.to_q"),
    ("k_proj", "attn.to_k"),
    ("v_proj", "attn.to_v"),
    ("norm.query_norm", "attn.norm_q"),
    ("norm.key_norm", "attn.norm_k"),
    ("attn_out", "attn.to_out.0"),
    ("mlp_in", "ff.linear_in"),
    ("mlp_out", "ff.linear_out"),
)
_ROWS: tuple[Row, ...] = (
    *((f"emb_in.{mode}", f"x_embedders.{mode}") for mode in _MODES),
    *_ENDS,
    *((f"{kind}.{mode}.lin", f"{kind}.{mode}.linear") for kind in _MODULATIONS for mode in (*_MODES, "txt")),
    *((f"{native}.{name}", f"{twin}.{other}") for native, twin in _BLOCKS for name, other in _BLOCK),
)

ARCH = Arch(
    name="flux3",
    title="Flux.3",
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
            dialects={"ai-toolkit": NATIVE},
        ),
    ),
    base_models=("flux-3", "flux3"),
    # Flux.1 and AuraFlow spell the attention of diffusers' single blocks alike, at the same width.
    widths=(Width("denoiser", ("q_proj", "k_proj", "v_proj", "attn_out", "mlp_in"), 3072),),
    depths={"single_blocks": 28},
)
