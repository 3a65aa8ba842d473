"""Small but real inputs: a Llama-shaped model, in one file and in shards, a tuned copy, and adapters of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

_RANK = 8


class Size(NamedTuple):
    """How large the inputs are.

    Attributes:
        layers: A count.
        width: Of the model, a count; its vocabulary is four times as many.
        shards: Files of the sharded model, a count.
    """

    layers: int
    width: int
    shards: int


SMALL = Size(layers=2, width=64, shards=3)  # for the suite of tests
USUAL = Size(layers=6, width=256, shards=4)  # 13 MB: a run takes about a second on one core


def make(folder: Path, size: Size) -> None:
    """Write base.safetensors, model (the same in shards), tuned.safetensors, and the adapters a and b."""
    draw = torch.Generator().manual_seed(0)
    base = {name: 0.05 * torch.randn(shape, generator=draw) for name, shape in _tensors(size)}
    tuned = dict(base)
    for name, (rows, columns) in _matrices(size):
        change = torch.randn(rows, 4, generator=draw) @ torch.randn(4, columns, generator=draw)
        tuned[f"{name}.weight"] = base[f"{name}.weight"] + 0.01 * change
    save_file(_half(base), folder / "base.safetensors", metadata={"format": "pt"})
    save_file(_half(tuned), folder / "tuned.safetensors", metadata={"format": "pt"})
    _sharded(folder / "model", _half(base), size.shards)
    for name in ("a", "b"):
        _adapter(folder / name, size, draw)


def _half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def _matrices(size: Size) -> Iterator[tuple[str, tuple[int, int]]]:
    """Paths and shapes of what is adapted."""
    width = size.width
    for layer in range(size.layers):
        for name in "qkvo":
            yield f"model.layers.{layer}.self_attn.{name}_proj", (width, width)
        for name in ("gate", "up"):
            yield f"model.layers.{layer}.mlp.{name}_proj", (2 * width, width)
        yield f"model.layers.{layer}.mlp.down_proj", (width, 2 * width)


def _tensors(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (4 * size.width, size.width)
    for name, shape in _matrices(size):
        yield f"{name}.weight", shape
    for layer in range(size.layers):
        yield f"model.layers.{layer}.input_layernorm.weight", (size.width,)
    yield "model.norm.weight", (size.width,)


def _sharded(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    folder.mkdir()
    names = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    owner = {key: names[number * shards // len(tensors)] for number, key in enumerate(tensors)}
    for name in names:
        own = {key: tensor for key, tensor in tensors.items() if owner[key] == name}
        save_file(own, folder / name, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": owner}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")


def _adapter(folder: Path, size: Size, draw: torch.Generator) -> None:
    tensors = {}
    for name, (rows, columns) in _matrices(size):
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(_RANK, columns, generator=draw)
        tensors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(rows, _RANK, generator=draw)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": _RANK,
        "lora_alpha": 2 * _RANK,
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in _matrices(size)}),
        "bias": "none",
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
