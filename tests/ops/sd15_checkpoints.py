"""Small Stable Diffusion 1.5 checkpoints, and what ``factories.kohya`` makes adapters for, in several containers."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import torch

_PREFIX = {"denoiser": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."}


def tensors(dtype: torch.dtype = torch.float16, seed: int = 0) -> dict[str, torch.Tensor]:
    """In a checkpoint's own names; the last one is of no adapter."""
    draw = torch.Generator().manual_seed(seed)
    found = {
        f"{_PREFIX[weight.component]}{weight.target}.weight": torch.randn(weight.shape, generator=draw)
        for weight in factories.SD15
    }
    found["first_stage_model.decoder.conv_in.weight"] = torch.randn(6, 4, 3, 3, generator=draw)
    return {key: (0.05 * tensor).to(dtype) for key, tensor in found.items()}


def safetensors(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """A checkpoint in one file."""
    factories.write_safetensors(path, state, None)
    return path


def pickle(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """A .ckpt, as trainers write it."""
    torch.save({"state_dict": state, "global_step": 3}, path)
    return path


def sharded(folder: Path, state: dict[str, torch.Tensor], shards: int = 2) -> Path:
    """A model folder with an index."""
    folder.mkdir()
    names = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    owner = {key: names[number % shards] for number, key in enumerate(state)}
    for name in names:
        safetensors(folder / name, {key: tensor for key, tensor in state.items() if owner[key] == name})
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": owner}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
