"""Weights that files number instead of naming: the orders in which programs meet them in a model.

Numbers follow torch's ``Module.modules()``: a module's children in the order in which its constructor registered
them. diffusers' UNet registers its middle last; its transformer blocks had the feed-forward between the attentions
until 0.12 and have it behind them since. CLIP's attention in transformers registers k, v, q, out. Names are those of
diffusers, with the component's prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Shape = tuple[int, int]

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP_PROJECTIONS = ("k_proj", "v_proj", "q_proj", "out_proj")
# Where the cross-attention reads the prompt rather than the image.
_READ_PROMPT = ("attn2.to_k", "attn2.to_v")
_GATE = "ff.net.0.proj"

_ATTN1 = tuple(f"attn1.{name}" for name in _PROJECTIONS)
_ATTN2 = tuple(f"attn2.{name}" for name in _PROJECTIONS)
# What a transformer block holds, in the order of its numbers; the usual order first.
_BLOCK_ORDERS = ((*_ATTN1, *_ATTN2, _GATE), (*_ATTN1, _GATE, *_ATTN2), (*_ATTN1, *_ATTN2))


class _Attention(NamedTuple):
    """An attention of a UNet.

    Attributes:
        path: Its name.
        level: Its width, in widths of the finest level.
        depth: How many transformer blocks it has.
    """

    path: str
    level: int
    depth: int


def _unet(down: Sequence[Shape], up: Sequence[Shape], middle: Shape) -> tuple[_Attention, ...]:
    """A UNet's attentions: (width, depth) of each level, 0 deep where it has none."""
    halves = (("down_blocks", down, 2), ("up_blocks", up, 3))
    return (
        *(
            _Attention(f"{half}.{number}.attentions.{place}", level, depth)
            for half, levels, count in halves
            for number, (level, depth) in enumerate(levels)
            for place in range(count)
            if depth
        ),
        _Attention("mid_block.attentions.0", *middle),
    )


_SD = _unet(((1, 1), (2, 1), (4, 1), (4, 0)), ((4, 0), (4, 1), (2, 1), (1, 1)), (4, 1))
_SDXL = _unet(((1, 0), (2, 2), (4, 10)), ((4, 10), (2, 2), (1, 0)), (4, 10))

# By architecture: the attentions of its UNet, and how wide its prompt is.
_UNETS = {"sd15": (_SD, 768), "sd2": (_SD, 1024), "sdxl": (_SDXL, 2048)}
# By architecture: how many layers its CLIP text encoder has, and how wide they are.
_CLIPS = {"sd15": (12, 768), "sd2": (23, 1024)}
# Segment Anything's image encoders: blocks, and how wide they are (ViT-B, ViT-L, ViT-H).
SAM_ENCODERS = {12: 768, 24: 1024, 32: 1280}


class Order(NamedTuple):
    """Numbered weights of one component.

    Attributes:
        arch: The architecture's name.
        names: What each number stands for, in diffusers' names.
    """

    arch: str
    names: tuple[str, ...]


def unet_orders(arch: str) -> tuple[Order, ...]:
    """The orders of Stable Diffusion's UNet, the one that is written first; none for other architectures."""
    if arch not in _CLIPS:
        return ()
    return tuple(Order(arch, _named(block)) for block in _BLOCK_ORDERS)


def text_encoder_order(arch: str) -> Order | None:
    """The order of a Stable Diffusion's text encoder; None for other architectures."""
    if arch not in _CLIPS:
        return None
    stem = "text_encoder.text_model.encoder.layers"
    names = (f"{stem}.{n}.self_attn.{name}" for n in range(_CLIPS[arch][0]) for name in _CLIP_PROJECTIONS)
    return Order(arch, tuple(names))


def _named(block: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"unet.{each.path}.transformer_blocks.0.{leaf}" for each in _SD for leaf in block)


def find_unet(shapes: Sequence[Shape]) -> Order | None:
    """The order whose weights have all these shapes (out, in), of Stable Diffusion 1 or 2; None if none has.

    The finest level may have any width, as in models made for tests; the prompt's width tells the two apart.
    """
    for arch in _CLIPS:
        for block, order in zip(_BLOCK_ORDERS, unet_orders(arch), strict=True):
            if list(shapes) == _shapes(block, shapes[0][0] if shapes else 0, _UNETS[arch][1]):
                return order
    return None


def _shapes(block: Sequence[str], finest: int, prompt: int) -> list[Shape]:
    found: list[Shape] = []
    for each in _SD:
        width = finest * each.level
        # The gate halves what goes through it, and the feed-forward is four times as wide.
        found += [(8 * width if leaf == _GATE else width, _width(leaf, width, prompt)) for leaf in block]
    return found


def _width(leaf: str, width: int, prompt: int) -> int:
    return prompt if leaf in _READ_PROMPT else width


def find_text_encoder(shapes: Sequence[Shape]) -> Order | None:
    """The order of the text encoder whose attention has all these shapes (out, in); None if there is none."""
    for arch, (layers, width) in _CLIPS.items():
        if len(shapes) == layers * len(_CLIP_PROJECTIONS) and set(shapes) == {(width, width)}:
            return text_encoder_order(arch)
    return None


def find_processors(prompt: int, numbers: int) -> Order | None:
    """The attention processors of the UNet whose prompt is so wide, in diffusers' ``attn_processors`` order.

    Args:
        prompt: The input width of a cross-attention's keys.
        numbers: How many processors there must be at least.
    """
    for arch, (attentions, width) in _UNETS.items():
        names = tuple(
            f"unet.{each.path}.transformer_blocks.{number}.{attention}"
            for each in attentions
            for number in range(each.depth)
            for attention in ("attn1", "attn2")
        )
        if width == prompt and numbers <= len(names):
            return Order(arch, names)
    return None
