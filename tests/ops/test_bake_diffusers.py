"""Baked diffusers folders and single files against diffusers' own fusing of the same trainer's file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_diffusers as tiny
import torch
from safetensors.torch import load_file, save_file

from loratools.ops.bake import bake
from tests.ops.test_diffusers_convert import POSITIVE, kohya, pipeline_of, trained

pytestmark = pytest.mark.peers
STRENGTH = 0.5


@pytest.fixture(scope="module", autouse=True)
def peers() -> None:
    for name in ("diffusers", "transformers", "peft"):
        pytest.importorskip(name, reason=f"{name} is not installed")


def models_of(arch: str) -> tiny.Models:
    torch.manual_seed(0)
    return tiny.CASES[arch].models()


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    error = float((found.double() - wanted.double()).norm())
    return error <= 1e-5 * float(wanted.double().norm().clamp_min(1e-2))


def own_adapter(path: Path, models: tiny.Models) -> set[tuple[str, str]]:
    """A file in diffusers' own layout, of all linear layers and convolutions; returns what it changes."""
    rng = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    changed = set()
    for component, model in models.items():
        for name in tiny.adaptable(model):
            shape = tiny.shape(model, name)
            assert shape is not None
            ones = [1] * len(shape[2:])
            tensors[f"{component}.{name}.lora_A.weight"] = torch.randn(4, *shape[1:], generator=rng)
            tensors[f"{component}.{name}.lora_B.weight"] = torch.randn(shape[0], 4, *ones, generator=rng)
            changed.add((component, f"{name}.weight"))
    save_file(tensors, path)
    return changed


@pytest.mark.parametrize("arch", ["sd15", "sdxl", "sd3", "flux"])
def test_a_folder_is_what_diffusers_fuses(arch: str, tmp_path: Path) -> None:
    models = models_of(arch)
    changes = own_adapter(tmp_path / "style.safetensors", models)
    for name, model in models.items():
        model.save_pretrained(tmp_path / "base" / name)
    said = {name: ["diffusers", type(model).__name__] for name, model in models.items()}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(said))

    bake(tmp_path / "base", [tmp_path / "style.safetensors"], tmp_path / "baked", weights=[STRENGTH])

    before = {
        name: {key: value.double() for key, value in model.state_dict().items()}
        for name, model in models.items()
    }
    pipeline = pipeline_of(arch, models)
    pipeline.load_lora_weights(tmp_path / "style.safetensors")
    pipeline.fuse_lora(list(models), lora_scale=STRENGTH)
    changed = set()
    for name, model in models.items():
        fused = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
        again = type(model).from_pretrained(tmp_path / "baked" / name).state_dict()
        for key, value in again.items():
            assert near(value, fused[key]), f"{name} {key}"
            if not torch.equal(value.double(), before[name][key]):
                changed.add((name, key))
    assert changed == changes


@pytest.mark.parametrize("arch", tiny.CASES)
def test_a_single_file_gets_the_rows_that_diffusers_takes_from_it(arch: str, tmp_path: Path) -> None:
    case, models = tiny.CASES[arch], models_of(arch)
    component, denoiser = next(iter(models.items()))
    adapted = [weight for weight in tiny.weights(case, models) if weight.component == component]
    own = denoiser.state_dict()
    tensors, wanted = {}, {}
    changes = trained(tmp_path / "style.safetensors", adapted, kohya(arch), POSITIVE)
    for weight in adapted:
        whole = torch.zeros(weight.shape)
        added = torch.zeros(weight.shape, dtype=torch.float64)
        for twin, rows in weight.pieces.items():
            whole[rows] = own[f"{twin}.weight"].reshape(len(rows), *weight.shape[1:])
            added[rows] = changes[component, twin].reshape(len(rows), *weight.shape[1:])
        tensors[f"{tiny.CHECKPOINT}{weight.name}.weight"] = whole
        wanted[f"{tiny.CHECKPOINT}{weight.name}.weight"] = whole.double() + STRENGTH * added
    for prefix in (tiny.CHECKPOINT, ""):
        cut = {prefix + key.removeprefix(tiny.CHECKPOINT): tensor for key, tensor in tensors.items()}
        save_file(cut, tmp_path / "base.safetensors")
        bake(
            tmp_path / "base.safetensors",
            [tmp_path / "style.safetensors"],
            tmp_path / "baked.safetensors",
            weights=[STRENGTH],
            overwrite=True,
        )
        found = load_file(tmp_path / "baked.safetensors")
        for key, value in wanted.items():
            assert near(found[prefix + key.removeprefix(tiny.CHECKPOINT)], value), key
