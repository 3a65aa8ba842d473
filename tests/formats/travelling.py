"""Adapters that every layout can hold, and their way through one, without a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from loratools import formats
from loratools.model import Adapter
from loratools.ops.convert import Converted, convert
from loratools.tensors import from_torch

# The layouts that can be asked for.
ISSUED = (
    *("kohya", "diffusers", "peft", "comfy", "onetrainer", "ai-toolkit", "musubi", "xlabs", "cloneofsimo"),
    *("attn-procs", "loralib", "sam", "lycoris"),
)
# What people look for in a header.
SAID = {
    "modelspec.title": "Ä title",
    "modelspec.trigger_phrase": "xx style",
    "ss_tag_frequency": '{"1_x": {"cat": 3, "dog, brown": 1}}',
    "ss_output_name": "x",
}
FLUX = {
    "double_blocks_0_img_attn_qkv": (24, 8),
    "double_blocks_0_txt_attn_qkv": (24, 8),
    "double_blocks_0_img_attn_proj": (8, 8),
}


def numbered_unet() -> Iterable[tuple[str, tuple[int, int]]]:
    """diffusers' names and shapes of all that cloneofsimo's first files number, at tiny widths."""
    blocks = [
        (f"down_blocks.{level}.attentions.{place}", 2**level) for level in (0, 1, 2) for place in (0, 1)
    ]
    blocks += [
        (f"up_blocks.{level}.attentions.{place}", 2 ** (3 - level))
        for level in (1, 2, 3)
        for place in (0, 1, 2)
    ]
    for block, level in [*blocks, ("mid_block.attentions.0", 4)]:
        width = 4 * level
        for attention, into in (("attn1", width), ("attn2", 768)):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                shape = (width, into if name in ("to_k", "to_v") else width)
                yield f"{block}.transformer_blocks.0.{attention}.{name}", shape


def pairs(modules: Iterable[tuple[str, tuple[int, int]]], up: str, down: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for number, (stem, (out, into)) in enumerate(modules, 1):
        tensors[f"{stem}.{up}"] = torch.full((out, 1), 0.5 * number)
        tensors[f"{stem}.{down}"] = torch.full((1, into), 1.0 / number)
    return tensors


def read(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], arch: str) -> Adapter:
    refs = {key: from_torch(key, tensor) for key, tensor in tensors.items()}
    return formats.read(refs, metadata=metadata, arch=arch)


def kohya(layout: str, metadata: Mapping[str, str]) -> Adapter:
    """An adapter in Kohya's layout that another layout can hold."""
    if layout in ("xlabs", "musubi"):
        stems, arch = [(f"lora_unet_{name}", shape) for name, shape in FLUX.items()], "flux"
    else:
        stems = [(f"lora_unet_{name.replace('.', '_')}", shape) for name, shape in numbered_unet()]
        arch = "sd15"
    return read(pairs(stems, "lora_up.weight", "lora_down.weight"), metadata, arch)


def again(converted: Converted, arch: str) -> Adapter:
    document = converted.document
    return formats.read(
        {ref.name: ref for ref in document.tensors},
        metadata=document.metadata,
        config=document.config or {},
        arch=arch,
    )


def through(adapter: Adapter, layout: str) -> Adapter:
    """The adapter as it is read from a file in that layout."""
    return again(convert(adapter, layout), adapter.arch)
