"""Adapters that are large enough for it to show which parts of them are read."""

from __future__ import annotations

import json

import factories as make
import torch

WIDTH, RANK = 1024, 16
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none"}


def peft_tensors(layers: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """A language model's LoRA: 64 KiB of float16 for each layer."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(layers):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        found[f"{module}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=draw).half()
        found[f"{module}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=draw).half() / 100
    return found


def peft_folder(folder, layers: int = 24, seed: int = 0):
    """An adapter's folder on this machine."""
    folder.mkdir(parents=True)
    make.write_safetensors(folder / "adapter_model.safetensors", peft_tensors(layers, seed), None)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


def bytes_of(folder) -> dict[str, bytes]:
    """The content of all files of a folder, by path relative to it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
