"""Small checkpoints that differ by what tests plant, in several containers and namings."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]

BLOCK = "layers.0."


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(shape: tuple[int, ...], rank: int, seed: int, scale: float = 0.1) -> torch.Tensor:
    columns = torch.Size(shape[1:]).numel()
    return scale * (random((shape[0], rank), seed) @ random((rank, columns), seed + 1)).reshape(shape)


def llama(seed: int = 0, vocabulary: int = 50) -> State:
    shapes = {
        "embed_tokens.weight": (vocabulary, 24),
        BLOCK + "self_attn.q_proj.weight": (24, 24),
        BLOCK + "self_attn.k_proj.weight": (12, 24),
        BLOCK + "self_attn.k_proj.bias": (12,),
        BLOCK + "mlp.up_proj.weight": (64, 24),
        BLOCK + "mlp.down_proj.weight": (24, 64),
        BLOCK + "input_layernorm.weight": (24,),
    }
    state = {f"model.{name}": random(shape, seed + at) for at, (name, shape) in enumerate(shapes.items())}
    return {**state, "lm_head.weight": random((vocabulary, 24), seed + 99)}


def tuned(base: State, rank: int = 3, *, only: str = "_proj.weight") -> State:
    """The base with a product of low rank on every matrix that is meant."""
    return {
        key: value + low_rank(tuple(value.shape), rank, 1000 + at) if only in key else value.clone()
        for at, (key, value) in enumerate(base.items())
    }


def save(state: State, path: Path) -> Path:
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 7}, path)
    else:
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def shard(state: State, folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    places = {key: names[at % count] for at, key in enumerate(state)}
    for name in names:
        save({key: value for key, value in state.items() if places[key] == name}, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
