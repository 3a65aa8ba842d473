"""The UNet of Stable Diffusion: CompVis' flat numbering of blocks against diffusers' nested one.

CompVis numbers all blocks of a half in one sequence, samplers included; diffusers numbers levels, and
resnets, attentions and samplers within them. The rows are generated from which levels have attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from loratools.archs._table import HOLE, Row, Table

PREFIXES = {
    "kohya": ("lora_unet_", "lora_unet_unet_"),
    "diffusers": ("unet.",),
    "peft": ("base_model.model.",),
    "comfy": ("diffusion_model.",),
    "lycoris": ("lycoris_", "lora_unet_"),
    "onetrainer": ("lora_unet_",),
    "checkpoint": ("model.diffusion_model.",),
}

# A native block, and diffusers' level, part of the level and place in that part.
_Block: TypeAlias = "tuple[str, str, str, int]"

_RESNETS = 2  # in each level on the way down, in every model but distilled and tiny ones
_MIDDLE: tuple[_Block, ...] = (
    ("middle_block.0", "mid_block", "resnets", 0),
    ("middle_block.1", "mid_block", "attentions", 0),
    ("middle_block.2", "mid_block", "resnets", 1),
)

_ENDS: tuple[Row, ...] = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
_SIZE_EMBEDDING: tuple[Row, ...] = (
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
)
_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_TRANSFORMER = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "norm1",
    "norm2",
    "norm3",
)


def unet(
    attention: tuple[bool, ...],
    *,
    transformer: str = HOLE,
    size_embedding: bool = False,
    resnets: int = _RESNETS,
) -> Table:
    """The table of a UNet.

    Args:
        attention: Which levels have attention, from the finest to the coarsest.
        transformer: The numbers of an attention's transformer blocks: any, or "0" where there is only one.
        size_embedding: Whether the sizes are embedded with the time.
        resnets: How many there are in each level on the way down; one more on the way up.
    """
    blocks = [*_way_down(attention, resnets), *_MIDDLE, *_way_up(attention, resnets)]
    inside = (
        "norm",
        "proj_in",
        *(f"transformer_blocks.{transformer}.{name}" for name in _TRANSFORMER),
        "proj_out",
    )
    parts: dict[str, tuple[tuple[str, str], ...]] = {
        "resnets": _RESNET,
        "attentions": tuple((name, name) for name in inside),
        "downsamplers": (("op", "conv"),),
        "upsamplers": (("conv", "conv"),),
    }
    return Table(
        (
            *_ENDS,
            *(_SIZE_EMBEDDING if size_embedding else ()),
            *(
                (f"{native}.{name}", f"{level}.{part}.{place}.{twin}")
                for native, level, part, place in blocks
                for name, twin in parts[part]
            ),
        )
    )


def _way_down(attention: tuple[bool, ...], resnets: int) -> Iterator[_Block]:
    """Each level: its resnets, with an attention after each or none, and a sampler but for the last level."""
    number = 1  # the first input block is conv_in
    for level, attends in enumerate(attention):
        for place in range(resnets):
            yield f"input_blocks.{number}.0", f"down_blocks.{level}", "resnets", place
            if attends:
                yield f"input_blocks.{number}.1", f"down_blocks.{level}", "attentions", place
            number += 1
        if level < len(attention) - 1:
            yield f"input_blocks.{number}.0", f"down_blocks.{level}", "downsamplers", 0
            number += 1


def _way_up(attention: tuple[bool, ...], resnets: int) -> Iterator[_Block]:
    """The levels from the coarsest: one resnet more in each, and the sampler in the level's last block."""
    number = 0
    for level, attends in enumerate(reversed(attention)):
        for place in range(resnets + 1):
            yield f"output_blocks.{number}.0", f"up_blocks.{level}", "resnets", place
            if attends:
                yield f"output_blocks.{number}.1", f"up_blocks.{level}", "attentions", place
            number += 1
        if level < len(attention) - 1:
            yield f"output_blocks.{number - 1}.{1 + attends}", f"up_blocks.{level}", "upsamplers", 0
