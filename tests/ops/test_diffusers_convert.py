"""What ``convert`` writes, diffusers' own loaders take whole, and fuse to the ΔW of the file it was made from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusers as tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools.errors import LayoutError
from loratools.ops.convert import convert_file

pytestmark = pytest.mark.peers
# Most alike, as PEFT tries every exception on every module: a fraction, a multiple, below zero, none at all.
RANKS = (4, 4, 1, 4, 4, 3, 4)
ALPHAS = (4.0, 4.0, 4.0, 0.5, 4.0, -1.5, 4.0, 4.0, 16.0, 4.0, 0.0)
# diffusers' converters of trainers' files halve their way to a balance, and never reach one from below zero.
POSITIVE = (4.0, 0.5, 4.0, 1.5, 16.0)
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
def nothing_said(unadapted: Collection[str] = ()) -> Iterator[None]:
    """Fail where the loaders warn: that is how they tell of keys that they miss, do not expect, or pass over.

    Args:
        unadapted: Components that the file has no modules for, of which the loaders say as much.
    """
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
    expected = [f"found with the prefix={name!r}" for name in unadapted]
    heard = [*said, *(str(each.message) for each in caught)]
    assert not [text for text in heard if not any(each in text for each in expected)]


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


def check(
    arch: str, models: tiny.Models, file: Path, changes: Mapping[tuple[str, str], torch.Tensor]
) -> None:
    """Load a file, fuse it, and compare every weight of every model with what the file's source says."""
    pipeline = pipeline_of(arch, models)
    before = weights_of(models)
    with nothing_said(models.keys() - {component for component, _ in changes}):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    assert injected(models) == changes.keys()
    pipeline.fuse_lora(components=list(models))
    after = weights_of(models)
    assert after.keys() == before.keys()
    wrong = []
    for key, value in after.items():
        expected = changes.get(key, torch.zeros_like(value))
        error = (value - before[key] - expected).norm()
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


def convert_through_diffusers(source: Path, to: str, arch: str) -> Path:
    """The file as diffusers has it, and that in another layout."""
    between, output = source.with_name("between.safetensors"), source.with_name("out.safetensors")
    convert_file(source, between, to="diffusers", arch=arch)
    convert_file(between, output, to=to, arch=arch)
    return output


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_the_first_format_of_a_unet_and_its_encoders_loads(arch: str, tmp_path: Path) -> None:
    """It names attention alone, and states no alpha: what alpha said is in the factors."""
    models = tiny.CASES[arch].models()
    adapted = [
        weight
        for weight in tiny.weights(tiny.CASES[arch], models)
        if any(part in weight.name for part in (".attn1.", ".attn2.", ".self_attn."))
    ]
    changes = trained(tmp_path / "in.safetensors", adapted, kohya(arch))
    output = convert_through_diffusers(tmp_path / "in.safetensors", "attn-procs", arch)
    assert any(".processor.to_q_lora.down.weight" in key for key in load_file(output))
    check(arch, models, output, changes)


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_diffusers_reads_our_kohya_files_of_a_unet(arch: str, tmp_path: Path) -> None:
    """One rank and one alpha: of several, its converter loses those of attention."""
    models = tiny.CASES[arch].models()
    adapted = tiny.weights(tiny.CASES[arch], models)
    changes = trained(tmp_path / "in.safetensors", adapted, kohya(arch), (1.5,), (4,))
    check(arch, models, convert_through_diffusers(tmp_path / "in.safetensors", "kohya", arch), changes)


@pytest.mark.parametrize(
    ("arch", "to"),
    [
        *[("flux", "kohya"), ("flux", "xlabs"), ("flux", "ai-toolkit")],
        *[("wan", "musubi"), ("wan", "comfy"), ("wan", "ai-toolkit")],
        *[("qwen_image", "musubi"), ("qwen_image", "comfy"), ("qwen_image", "ai-toolkit")],
    ],
)
def test_diffusers_reads_our_files_of_a_transformer(arch: str, to: str, tmp_path: Path) -> None:
    """Where its converters know the weights: blocks, and of Flux.1's single ones what has no width of its own."""
    models = tiny.CASES[arch].models()
    adapted = [
        weight
        for weight in tiny.weights(tiny.CASES[arch], models)
        if weight.component == "transformer"
        and "blocks." in weight.name
        and "linear1" not in weight.name
        and (to != "xlabs" or "attn.qkv" in weight.name or "attn.proj" in weight.name)
    ]
    changes = trained(tmp_path / "in.safetensors", adapted, kohya(arch), POSITIVE)
    check(arch, models, convert_through_diffusers(tmp_path / "in.safetensors", to, arch), changes)


def with_magnitudes(
    path: Path, models: tiny.Models, adapted: Sequence[tiny.Weight], name: str, changes: Changes
) -> Changes:
    """Make a Kohya file's modules of one architecture DoRAs; their ΔW on these models."""
    tensors = load_file(path)
    base = weights_of(models)
    found = dict(changes)
    rng = torch.Generator().manual_seed(11)
    for weight in adapted:
        magnitude = 0.5 + torch.rand(weight.shape[0], *[1] * (len(weight.shape) - 1), generator=rng)
        tensors[f"{kohya(name)(weight)}.dora_scale"] = magnitude
        for twin, rows in weight.pieces.items():
            key = (weight.component, twin)
            merged = base[key].double() + changes[key]
            norms = merged.flatten(1).norm(dim=1).view(-1, *[1] * (merged.ndim - 1))
            found[key] = magnitude[rows].double() * merged / norms - base[key].double()
    save_file(tensors, path)
    return found


@pytest.mark.parametrize("arch", ["sd15", "flux"])
def test_magnitudes_are_taken_by_diffusers_and_by_transformers(arch: str, tmp_path: Path) -> None:
    """Of fused weights, each part has its rows' magnitudes."""
    case = tiny.CASES[arch]
    models, source = case.models(), tmp_path / "in.safetensors"
    adapted = tiny.weights(case, models)
    changes = trained(source, adapted, kohya(arch))
    changes = with_magnitudes(source, models, adapted, arch, changes)
    convert_file(source, tmp_path / "out.safetensors", to="diffusers", arch=arch)
    check(arch, models, tmp_path / "out.safetensors", changes)


def test_magnitudes_of_some_modules_are_refused(tmp_path: Path) -> None:
    """diffusers has one configuration for a model, and would make all of its modules DoRAs."""
    case = tiny.CASES["flux"]
    models, source = case.models(), tmp_path / "in.safetensors"
    adapted = tiny.weights(case, models)
    changes = trained(source, adapted, kohya("flux"))
    encoder = [weight for weight in adapted if weight.component == "text_encoder"]
    some = [weight for weight in adapted if ".img_attn." in weight.name]
    both = with_magnitudes(source, models, encoder, "flux", changes)
    convert_file(source, tmp_path / "whole.safetensors", to="diffusers", arch="flux")
    with_magnitudes(source, models, some, "flux", changes)
    with pytest.raises(LayoutError, match="both DoRA and plain LoRA in one denoiser"):
        convert_file(source, tmp_path / "refused.safetensors", to="diffusers", arch="flux")
    assert not (tmp_path / "refused.safetensors").exists()
    check("flux", models, tmp_path / "whole.safetensors", both)


@pytest.mark.parametrize(
    ("fault", "told"),
    [("missing", "missing keys"), ("unexpected", "unexpected keys"), ("wrong", "blocks.0.attn.to_q")],
)
def test_a_fault_would_be_noticed(fault: str, told: str, tmp_path: Path) -> None:
    case = tiny.CASES["qwen_image"]
    models, output = case.models(), tmp_path / "out.safetensors"
    changes = trained(tmp_path / "in.safetensors", tiny.weights(case, models), kohya("qwen_image"))
    convert_file(tmp_path / "in.safetensors", output, to="diffusers", arch="qwen_image")
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(output)
    key = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    if fault == "missing":
        del tensors[key]
    elif fault == "unexpected":
        tensors[key.replace("to_q", "to_queries")] = tensors[key].clone()
    else:
        tensors[key] = tensors[key] * 1.0001
    save_file(tensors, output, metadata)
    with pytest.raises(AssertionError, match=told):
        check("qwen_image", models, output, changes)
