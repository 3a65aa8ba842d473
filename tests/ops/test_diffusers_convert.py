"""What ``convert`` writes, diffusers' own loaders take whole, and fuse to the ΔW of the file it was made from."""

from __future__ import annotations

import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusers as tiny
import torch
from safetensors.torch import save_file

from loratools.ops.convert import convert_file

pytestmark = pytest.mark.peers
# Some that are their rank, and others: a fraction, one below zero, none at all.
RANKS = (4, 1, 3, 4, 2)
ALPHAS = (4.0, 0.5, 3.0, 4.0, -1.5, 16.0, 0.0)
CASES = pytest.mark.parametrize("arch", tiny.CASES)
# By component and path, what fusing has to add to a weight of diffusers' model.
Changes = dict[tuple[str, str], torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def peers() -> None:
    for name in ("diffusers", "transformers", "peft"):
        pytest.importorskip(name, reason=f"{name} is not installed")


def pipeline_of(arch: str, models: tiny.Models) -> Any:
    """A pipeline's loader with nothing but models, in float64 so that fusing rounds nothing away."""
    from diffusers.loaders import lora_pipeline

    mixin = getattr(lora_pipeline, tiny.CASES[arch].mixin)
    models = {name: model.double() for name, model in models.items()}
    return type("Pipeline", (mixin,), {"hf_device_map": None, "components": models, **models})()


@contextmanager
def nothing_said() -> Iterator[None]:
    """Fail where the loaders warn: that is how they tell of keys that they miss, do not expect, or pass over."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear = Ear(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for each in loggers:
        each.addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for each in loggers:
            each.removeHandler(ear)
    said += [str(each.message) for each in caught]
    assert not said


def trained(
    path: Path,
    adapted: Sequence[tiny.Weight],
    stem: Callable[[tiny.Weight], str],
    scaled: Sequence[float] = ALPHAS,
    ranks: Sequence[int] = RANKS,
) -> Changes:
    """Write a file as trainers do, with an alpha beside each pair of factors.

    Args:
        path: The file.
        adapted: The weights that it changes.
        stem: How it calls one of them.
        scaled: Alphas, in turn.
        ranks: Ranks, in turn.

    Returns:
        The ΔW of diffusers' weights, in float64.
    """
    rng = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    changes: Changes = {}
    for i, weight in enumerate(adapted):
        rank, alpha = ranks[i % len(ranks)], scaled[i % len(scaled)]
        out, *within = weight.shape
        down = torch.randn(rank, *within, generator=rng)
        up = torch.randn(out, rank, *[1] * (len(within) - 1), generator=rng)
        name = stem(weight)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        delta = (up.double().flatten(1) @ down.double().flatten(1)) * (alpha / rank)
        for twin, rows in weight.pieces.items():
            changes[weight.component, twin] = delta.view(weight.shape)[rows]
    save_file(tensors, path)
    return changes


def kohya(arch: str) -> Callable[[tiny.Weight], str]:
    case = tiny.CASES[arch]

    def stem(weight: tiny.Weight) -> str:
        if weight.component in case.encoders:
            return case.encoders[weight.component][0] + weight.name.replace(".", "_")
        name = weight.name if case.flattened == "native" else next(iter(weight.pieces))
        return "lora_unet_" + name.replace(".", "_")

    return stem


def comfy(arch: str) -> Callable[[tiny.Weight], str]:
    case = tiny.CASES[arch]

    def stem(weight: tiny.Weight) -> str:
        return case.encoders.get(weight.component, ("", "diffusion_model."))[1] + weight.name

    return stem


def loaded(arch: str, models: tiny.Models, file: Path) -> Any:
    """The pipeline with the file's LoRA in its models, taken without a word of warning."""
    pipeline = pipeline_of(arch, models)
    with nothing_said():
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return pipeline


def injected(models: tiny.Models) -> set[tuple[str, str]]:
    return {
        (component, name)
        for component, model in models.items()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and module.lora_A
    }


def weights_of(models: tiny.Models) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (component, name.removesuffix(".weight").replace(".base_layer", "")): value.detach().clone()
        for component, model in models.items()
        for name, value in model.state_dict().items()
        if name.endswith(".weight") and ".lora_" not in name
    }


def check(arch: str, models: tiny.Models, file: Path, changes: Mapping[tuple[str, str], torch.Tensor]) -> None:
    """Load a file, fuse it, and compare every weight of every model with what the file's source says."""
    before = weights_of(models)
    pipeline = loaded(arch, models, file)
    assert injected(models) == changes.keys()
    pipeline.fuse_lora(components=list(models))
    after = weights_of(models)
    assert after.keys() == before.keys()
    wrong = []
    for key, value in after.items():
        expected = changes.get(key, torch.zeros_like(value))
        error = (value - before[key].double() - expected).norm()
        # Adding to a weight and subtracting it again rounds in float64.
        if not error <= 1e-5 * expected.norm() + 1e-12 * value.norm():
            wrong.append((key, float(error), float(expected.norm())))
    assert not wrong


@CASES
@pytest.mark.parametrize("spelt", [kohya, comfy])
def test_what_trainers_write_becomes_what_diffusers_loads(
    arch: str, spelt: Callable[[str], Callable[[tiny.Weight], str]], tmp_path: Path
) -> None:
    case = tiny.CASES[arch]
    models = case.models()
    changes = trained(tmp_path / "in.safetensors", tiny.weights(case, models), spelt(arch))
    for component, model in models.items():
        # The file has a module for every kind of layer that the model has.
        names = [name for owner, name in changes if owner == component]
        assert tiny.skeletons(names) == tiny.skeletons(tiny.adaptable(model))
    output = tmp_path / "out.safetensors"
    report = convert_file(tmp_path / "in.safetensors", output, to="diffusers", arch=arch)
    assert report.modules[1] == len(changes)
    check(arch, models, output, changes)
