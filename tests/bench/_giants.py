"""Checkpoints and adapters of the largest public models: headers of the real shapes, and no data behind them.

The files are as long as the real ones, but sparse: they take next to no room, and what is planned from headers is
planned as for the real model. Shapes follow from the models' public configurations.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from loratools.io import build
from loratools.tensors import nbytes

_BLOCK = 128  # rows and columns that share a scale of DeepSeek-V3's float8


class Tensor(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        name: Its key.
        dtype: The safetensors name of it.
        shape: Its shape.
        adapted: Whether it is the weight of a linear layer that an adapter for all of them changes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    adapted: bool = False


class Giant(NamedTuple):
    """A public model.

    Attributes:
        title: For people.
        config: What of its configuration is needed to know it.
        shards: How many files it is published in.
        tensors: All of it.
    """

    title: str
    config: dict[str, object]
    shards: int
    tensors: tuple[Tensor, ...]


def llama_405b() -> Giant:
    """Llama-3.1-405B: 126 layers of width 16,384, feed-forward 53,248, 128 heads and 8 of keys and values; bfloat16."""
    return Giant("Llama-3.1-405B, bfloat16", {"model_type": "llama"}, 191, tuple(_llama_tensors()))


def _llama_tensors() -> Iterator[Tensor]:
    width, inner, narrow, words = 16384, 53248, 8 * 128, 128256
    yield Tensor("model.embed_tokens.weight", "BF16", (words, width))
    for number in range(126):
        layer = f"model.layers.{number}"
        for name, shape in (
            ("self_attn.q_proj", (width, width)),
            ("self_attn.k_proj", (narrow, width)),
            ("self_attn.v_proj", (narrow, width)),
            ("self_attn.o_proj", (width, width)),
            ("mlp.gate_proj", (inner, width)),
            ("mlp.up_proj", (inner, width)),
            ("mlp.down_proj", (width, inner)),
        ):
            yield Tensor(f"{layer}.{name}.weight", "BF16", shape, adapted=True)
        yield Tensor(f"{layer}.input_layernorm.weight", "BF16", (width,))
        yield Tensor(f"{layer}.post_attention_layernorm.weight", "BF16", (width,))
    yield Tensor("model.norm.weight", "BF16", (width,))
    yield Tensor("lm_head.weight", "BF16", (words, width))


def deepseek_v3() -> Giant:
    """DeepSeek-V3: 61 layers of width 7,168, three of them dense, 256 experts and a shared one in each of the others.

    As published: float8 with a float32 scale for 128 x 128 values, and the layer that predicts a second token (61),
    which transformers does not load, so that no adapter changes it.
    """
    return Giant("DeepSeek-V3, float8", {"model_type": "deepseek_v3"}, 163, tuple(_deepseek_tensors()))


def _deepseek_tensors() -> Iterator[Tensor]:
    width, words = 7168, 129280
    yield Tensor("model.embed_tokens.weight", "BF16", (words, width))
    for number in range(62):
        yield from _deepseek_layer(f"model.layers.{number}", dense=number < 3, adapted=number < 61)
    extra = "model.layers.61"
    yield Tensor(f"{extra}.embed_tokens.weight", "BF16", (words, width))
    yield Tensor(f"{extra}.eh_proj.weight", "BF16", (width, 2 * width))
    yield Tensor(f"{extra}.shared_head.head.weight", "BF16", (words, width))
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield Tensor(f"{extra}.{name}.weight", "BF16", (width,))
    yield Tensor("model.norm.weight", "BF16", (width,))
    yield Tensor("lm_head.weight", "BF16", (words, width))


def _deepseek_layer(layer: str, *, dense: bool, adapted: bool) -> Iterator[Tensor]:
    width, heads = 7168, 128
    linear = [
        ("self_attn.q_a_proj", (1536, width)),
        ("self_attn.q_b_proj", (heads * (128 + 64), 1536)),
        ("self_attn.kv_a_proj_with_mqa", (512 + 64, width)),
        ("self_attn.kv_b_proj", (heads * (128 + 128), 512)),
        ("self_attn.o_proj", (width, heads * 128)),
    ]
    if dense:
        linear += _feed_forward("mlp", width, 18432)
    else:
        for expert in range(256):
            linear += _feed_forward(f"mlp.experts.{expert}", width, 2048)
        linear += _feed_forward("mlp.shared_experts", width, 2048)
        yield Tensor(f"{layer}.mlp.gate.weight", "BF16", (256, width))
        yield Tensor(f"{layer}.mlp.gate.e_score_correction_bias", "F32", (256,))
    for name, shape in linear:
        yield Tensor(f"{layer}.{name}.weight", "F8_E4M3", shape, adapted=adapted)
        scales = (-(-shape[0] // _BLOCK), -(-shape[1] // _BLOCK))
        yield Tensor(f"{layer}.{name}.weight_scale_inv", "F32", scales)
    for name, size in (
        ("self_attn.q_a_layernorm", 1536),
        ("self_attn.kv_a_layernorm", 512),
        ("input_layernorm", width),
        ("post_attention_layernorm", width),
    ):
        yield Tensor(f"{layer}.{name}.weight", "BF16", (size,))


def _feed_forward(name: str, width: int, inner: int) -> list[tuple[str, tuple[int, int]]]:
    return [
        (f"{name}.gate_proj", (inner, width)),
        (f"{name}.up_proj", (inner, width)),
        (f"{name}.down_proj", (width, inner)),
    ]


def write_model(folder: Path, giant: Giant) -> Path:
    """A sharded model of headers, in about as many files of about one size as it is published in."""
    folder.mkdir()
    total = sum(nbytes(each.shape, each.dtype) for each in giant.tensors)
    groups: list[list[Tensor]] = [[]]
    held = 0
    for tensor in giant.tensors:
        size = nbytes(tensor.shape, tensor.dtype)
        if groups[-1] and held + size / 2 > len(groups) * total / giant.shards:
            groups.append([])
        groups[-1].append(tensor)
        held += size
    index: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):06d}.safetensors"
        _sparse(folder / name, group)
        index.update(dict.fromkeys((tensor.name for tensor in group), name))
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps(giant.config))
    return folder


def write_adapter(folder: Path, giant: Giant, rank: int = 64) -> Path:
    """A PEFT folder of headers for all linear layers, in bfloat16."""
    folder.mkdir()
    tensors: list[Tensor] = []
    for weight in giant.tensors:
        if weight.adapted:
            stem = "base_model.model." + weight.name.removesuffix(".weight")
            out, width = weight.shape
            tensors.append(Tensor(f"{stem}.lora_A.weight", "BF16", (rank, width)))
            tensors.append(Tensor(f"{stem}.lora_B.weight", "BF16", (out, rank)))
    _sparse(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _sparse(path: Path, tensors: Iterable[Tensor]) -> None:
    """A safetensors file whose data is a hole."""
    held = list(tensors)
    head = build([(each.name, each.dtype, each.shape) for each in held], {"format": "pt"})
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(nbytes(each.shape, each.dtype) for each in held))
