"""Vision models and CLIP, whose paths are their own names in every layout."""

from __future__ import annotations

from loratools.archs._arch import Arch
from loratools.archs._table import Component

ARCH = Arch(
    name="vision",
    title="vision model",
    components=(Component("vision_model", {"peft": ("base_model.model.",)}),),
    base_models=("vit-", "siglip", "clip-", "dinov2", "dinov3", "deit", "beit", "swin", "segformer"),
    markers=(
        "vision_model.encoder.layers.#",  # CLIP, SigLIP
        "text_model.encoder.layers.#",
        "vision_model.embeddings",
        "vit.encoder.layer.#",
        "vit.layers.#.attention",
        "vit.layers.#.mlp",
        "deit.encoder.layer.#",
        "beit.encoder.layer.#",
        "dinov2.encoder.layer.#",
        "swin.encoder.layers.#",
        "segformer.encoder.block.#",
        "convnext.encoder.stages.#",
        "image_encoder.blocks.#",  # Segment Anything
        "patch_embed.proj",
    ),
)
