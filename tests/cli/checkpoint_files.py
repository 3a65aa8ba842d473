"""Files that baking, extracting and verifying are given by mistake, and what a refusal has to be like."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import factories
import torch
from safetensors.torch import save_file

from tests.cli.running import invoke
from tests.ops import sd15_checkpoints

UNET = "model.diffusion_model."
QUERY = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def state(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Tensors in a safetensors file."""
    save_file({key: each.contiguous() for key, each in tensors.items()}, path)
    return path


def tuned(seed: int = 5) -> dict[str, torch.Tensor]:
    """The small checkpoint after a training: each weight differs by a product of rank 2."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for key, tensor in sd15_checkpoints.tensors(torch.float32).items():
        rows = tensor.flatten(1)
        change = torch.randn(len(rows), 2, generator=draw) @ torch.randn(2, rows.shape[1], generator=draw)
        found[key] = (tensor + 0.01 * change.reshape(tensor.shape)).half()
    return found


def llama(width: int = 8, vocabulary: int = 24) -> dict[str, torch.Tensor]:
    """A language model of two layers."""
    draw = torch.Generator().manual_seed(1)
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    found = {"model.embed_tokens.weight": torch.randn(vocabulary, width, generator=draw)}
    for layer in range(2):
        for name in names:
            found[f"model.layers.{layer}.{name}.weight"] = torch.randn(width, width, generator=draw)
    return found


def index(folder: Path, name: str) -> None:
    """Have a sharded model's index say that the first key lies in another file."""
    path = folder / "model.safetensors.index.json"
    said = json.loads(path.read_text())
    said["weight_map"][next(iter(said["weight_map"]))] = name
    path.write_text(json.dumps(said))


def snapshot(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones too, by the digest of its content; folders by nothing."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(folder.rglob("*"))
    }


def refused(folder: Path, *arguments: object) -> str:
    """The message of a command that has to fail, leaving everything in a folder as it was."""
    before = snapshot(folder)
    result = invoke(*arguments)
    assert result.exit_code == 1, result.stdout + result.stderr
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "fault in loratools" not in result.stderr
    assert snapshot(folder) == before
    return result.stderr


def standard(folder: Path) -> Path:
    """A folder with base.safetensors, tuned.safetensors, a.safetensors (an adapter), and m (the base, sharded)."""
    state(folder / "base.safetensors", sd15_checkpoints.tensors())
    state(folder / "tuned.safetensors", tuned())
    factories.kohya(folder / "a.safetensors", "sd15")
    sd15_checkpoints.sharded(folder / "m", sd15_checkpoints.tensors())
    return folder
