"""Adapters with one fault each, by the code of what doctor says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import factories as make
import torch

Fault = Callable[[Path], tuple[Path, dict[str, Any]]]
"""Makes a file in a folder; returns what to give to doctor: the path, and options."""

KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def edited(folder: Path, **fields: Any) -> Path:
    """A PEFT folder whose configuration says something else; a field of None is taken out."""
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text("utf-8")), **fields}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), "utf-8")
    return folder


def rewritten(made: make.Made, changed: Mapping[str, torch.Tensor | None]) -> Path:
    """The same file with some tensors changed, added or (None) taken out."""
    tensors = {**made.tensors, **changed}
    make.write_safetensors(
        made.file, {key: each for key, each in tensors.items() if each is not None}, {"format": "pt"}
    )
    return made.path


def renamed(made: make.Made, name: str) -> Path:
    """The same PEFT folder with an adapter's name left in its keys."""
    named = {
        key.replace("_A.weight", f"_A.{name}.weight").replace("_B.weight", f"_B.{name}.weight"): each
        for key, each in made.tensors.items()
    }
    return rewritten(made, {**dict.fromkeys(made.tensors), **named})


def base(folder: Path, *, prefix: str = "", width: int = 16, vocabulary: int = 20, layers: int = 2) -> Path:
    """A base model's file with the weights that ``factories.LLAMA`` adapts, and its embeddings."""
    shapes = {**dict(make.LLAMA), "model.embed_tokens": (vocabulary, 16), "lm_head": (vocabulary, 16)}
    tensors = {
        f"{prefix}{path}.weight": torch.zeros(*(width if size == 16 else size for size in shape))
        for path, shape in shapes.items()
        if "layers." not in path or int(path.split(".")[2]) < layers
    }
    make.write_safetensors(folder / "base.safetensors", tensors, {})
    return folder / "base.safetensors"


def _unreadable(folder: Path) -> Path:
    folder.mkdir()
    file = folder / "x.safetensors"
    file.write_bytes(b"\xff" * 64)
    return file


def _not_an_adapter(folder: Path) -> Path:
    make.write_safetensors(folder / "x.safetensors", {"<token>": torch.ones(768)}, None)
    return folder / "x.safetensors"


def _mixed_styles(folder: Path) -> Path:
    extra = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_A.weight": torch.ones(4, 8),
        "lora_unet_mid_block_attentions_0_proj_in.lora_B.weight": torch.ones(8, 4),
    }
    return make.kohya(folder / "x.safetensors", "sd15", extra=extra).path


def _malformed(folder: Path) -> Path:
    name = "lora_unet_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    tensors = {f"{name}_lora_down.weight": torch.ones(2, 320), f"{name}_lora_up.weight": torch.ones(320, 2)}
    make.write_safetensors(folder / "x.safetensors", tensors, None)
    return folder / "x.safetensors"


def _without_config(folder: Path) -> Path:
    made = make.peft(folder)
    (made.path / "adapter_config.json").unlink()
    return made.path


def _zeroed(made: make.Made, part: str) -> Path:
    return rewritten(made, {key: torch.zeros_like(each) for key, each in made.tensors.items() if part in key})


def _half_dora(folder: Path) -> Path:
    made = make.peft(folder, dora=True)
    return rewritten(made, {f"{KEY}.lora_magnitude_vector": None})


def _stale(folder: Path) -> Path:
    said = {"ss_network_dim": "16", "ss_network_alpha": "2"}
    return make.kohya(folder / "x.safetensors", "sd15", rank=4, alpha=2.0, metadata=said).path


def _q_alone(folder: Path) -> Path:
    model = tuple(row for row in make.LLAMA if not row[0].endswith("v_proj"))
    return make.peft(folder, model).path


def _noted(folder: Path) -> Path:
    return make.kohya(folder / "x.safetensors", "sd15", only=["lora_te_"]).path


def _renamed_file(folder: Path) -> Path:
    made = make.peft(folder)
    return made.file.rename(folder / "Copy of adapter_model.safetensors")


def _plain(folder: Path) -> Path:
    return make.peft(folder).path


FAULTS: dict[str, Fault] = {
    "unreadable": lambda folder: (_unreadable(folder), {}),
    "not-an-adapter": lambda folder: (_not_an_adapter(folder), {}),
    "incomplete-pairs": lambda folder: (
        rewritten(make.peft(folder), {f"{KEY}.lora_B.weight": None}),
        {},
    ),
    "shapes": lambda folder: (
        rewritten(make.peft(folder), {f"{KEY}.lora_B.weight": torch.ones(16, 5)}),
        {},
    ),
    "empty-tensors": lambda folder: (
        rewritten(make.peft(folder), {f"{KEY}.lora_B.weight": torch.ones(0)}),
        {},
    ),
    "prefix-doubled": lambda folder: (make.peft(folder, form="double").path, {}),
    "prefix-missing": lambda folder: (make.peft(folder, form="no_prefix").path, {}),
    "prefix-wrapped": lambda folder: (make.peft(folder, form="fsdp").path, {}),
    "adapter-name": lambda folder: (renamed(make.peft(folder), "style"), {}),
    "malformed-keys": lambda folder: (_malformed(folder), {}),
    "mixed-styles": lambda folder: (_mixed_styles(folder), {}),
    "no-config": lambda folder: (_without_config(folder), {}),
    "rank-contradicts": lambda folder: (edited(_plain(folder), r=8), {}),
    "targets-contradict": lambda folder: (edited(_plain(folder), target_modules=["q_proj"]), {}),
    "method-contradicts": lambda folder: (edited(_plain(folder), peft_type="LOHA"), {}),
    "dora-contradicts": lambda folder: (edited(_plain(folder), use_dora=True), {}),
    "whole-missing": lambda folder: (edited(_plain(folder), modules_to_save=["lm_head"]), {}),
    "pattern-invalid": lambda folder: (edited(_plain(folder), rank_pattern={"q_proj(": 4}), {}),
    "pattern-order": lambda folder: (
        edited(_plain(folder), alpha_pattern={"self_attn.q_proj": 8, r".*\.q_proj": 16}),
        {},
    ),
    "unknown-fields": lambda folder: (edited(_plain(folder), use_magic=True), {}),
    "mutated-base": lambda folder: (edited(_plain(folder), init_lora_weights="pissa_niter_4"), {}),
    "base-layer": lambda folder: (
        make.peft(
            folder,
            embedding=True,
            extra={"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(20, 16)},
        ).path,
        {},
    ),
    "unknown-alpha": lambda folder: (edited(_plain(folder), lora_alpha=None), {}),
    "stale-alpha": lambda folder: (_stale(folder), {}),
    "odd-alpha": lambda folder: (make.kohya(folder / "x.safetensors", "sd15", alpha=0.0).path, {}),
    "nonfinite-scale": lambda folder: (
        make.kohya(folder / "x.safetensors", "sd15", alphas={"mid": float("nan")}).path,
        {},
    ),
    "metadata-contradicts": lambda folder: (
        make.kohya(folder / "x.safetensors", "sd15", metadata={"ss_network_dim": "99"}).path,
        {},
    ),
    "dora-mixed": lambda folder: (_half_dora(folder), {}),
    "unclaimed": lambda folder: (make.peft(folder, extra={"surprise": torch.ones(3)}).path, {}),
    "nonfinite": lambda folder: (
        rewritten(make.peft(folder), {f"{KEY}.lora_B.weight": torch.full((16, 4), torch.inf)}),
        {},
    ),
    "untrained": lambda folder: (_zeroed(make.peft(folder), "lora_B"), {}),
    "zero-modules": lambda folder: (
        rewritten(make.peft(folder), {f"{KEY}.lora_B.weight": torch.zeros(16, 4)}),
        {},
    ),
    "overflow": lambda folder: (
        rewritten(make.peft(folder), {f"{KEY}.lora_B.weight": torch.full((16, 4), 40000.0)}),
        {},
    ),
    "base-unreadable": lambda folder: (_plain(folder), {"base": folder / "nothing"}),
    "not-in-base": lambda folder: (_plain(folder), {"base": base(folder.parent, layers=1)}),
    "shape-differs": lambda folder: (_plain(folder), {"base": base(folder.parent, width=12)}),
    "vocabulary": lambda folder: (
        make.peft(folder, embedding=True).path,
        {"base": base(folder.parent, vocabulary=24)},
    ),
    "other-names": lambda folder: (_plain(folder), {"base": base(folder.parent, prefix="language_model.")}),
    "layout": lambda folder: (make.mlx(folder).path, {"runtime": "vllm"}),
    "file-name": lambda folder: (_renamed_file(folder), {"runtime": "vllm"}),
    "kind": lambda folder: (make.peft(folder, kind="adalora").path, {"runtime": "vllm"}),
    "family": lambda folder: (make.kohya(folder / "x.safetensors", "sd15").path, {"runtime": "vllm"}),
    "rank-limit": lambda folder: (make.peft(folder, rank=8).path, {"runtime": "vllm", "max_rank": 4}),
    "partner-missing": lambda folder: (_q_alone(folder), {"runtime": "sglang"}),
    "layers-missing": lambda folder: (_plain(folder), {"runtime": "lorax"}),
    "refused": lambda folder: (make.peft(folder, dora=True).path, {"runtime": "vllm"}),
    "ignored": lambda folder: (
        make.peft(folder, alphas={make.LLAMA[0][0]: 16.0}).path,
        {"runtime": "vllm"},
    ),
    "note": lambda folder: (_noted(folder), {}),
}
