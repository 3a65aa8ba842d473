"""Z-Image: a transformer of single stream blocks with refiners for noise and prompt.

ComfyUI's checkpoint fuses q, k and v, and is the native column here; the original repository, its trainers and
diffusers have them apart.
"""

from __future__ import annotations

from loratools.archs._arch import Arch, Proportion, Width
from loratools.archs._table import DIFFUSERS, Component, Row, Table, same

_STACKS = ("layers", "noise_refiner", "context_refiner")


def _block(stack: str) -> tuple[Row, ...]:
    return (
        (
            f"{stack}.{{}}.attention.qkv",
            (
                f"{stack}.{{}}.attention.to_q",
                f"{stack}.{{}}.attention.to_k",
                f"{stack}.{{}}.attention.to_v",
            ),
        ),
        (f"{stack}.{{}}.attention.q_norm", f"{stack}.{{}}.attention.norm_q"),
        (f"{stack}.{{}}.attention.k_norm", f"{stack}.{{}}.attention.norm_k"),
        (f"{stack}.{{}}.attention.out", f"{stack}.{{}}.attention.to_out.0"),
        *same(
            f"{stack}.{{}}.attention_norm1",
            f"{stack}.{{}}.attention_norm2",
            f"{stack}.{{}}.feed_forward.w1",
            f"{stack}.{{}}.feed_forward.w2",
            f"{stack}.{{}}.feed_forward.w3",
            f"{stack}.{{}}.ffn_norm1",
            f"{stack}.{{}}.ffn_norm2",
            f"{stack}.{{}}.adaLN_modulation.0",
        ),
    )


_ROWS: tuple[Row, ...] = (
    # diffusers names them for the patch's size in space and in time.
    ("x_embedder", "all_x_embedder.2-1"),
    ("final_layer.linear", "all_final_layer.2-1.linear"),
    ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    *same(
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "cap_embedder.0",
        "cap_embedder.1",
        "x_pad_token",
        "cap_pad_token",
    ),
    *(row for stack in _STACKS for row in _block(stack)),
)

ARCH = Arch(
    name="z_image",
    title="Z-Image",
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
            kohya_dialect=DIFFUSERS,
        ),
    ),
    kohya_versions=("z_image",),
    base_models=("z-image", "zimage"),
    # Lumina 2 and Ideogram 4 have such blocks at other widths, Lumina 2 fewer heads for k and v.
    widths=(
        Width(
            "denoiser",
            ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w3"),
            3840,
        ),
    ),
    proportions=(Proportion(("attention.qkv",), 3, 1),),
)
