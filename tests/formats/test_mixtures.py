"""One file with several prefixes, suffixes and separators at once, and alphas of every shape."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt
from loratools.errors import NameResolutionError, NonFiniteError
from loratools.formats._scaling import refuse_nonfinite

NATIVE = "input_blocks.1.1.transformer_blocks.0."
DIFFUSERS = "down_blocks.0.attentions.0.transformer_blocks.0."
KOHYA = "lora_unet_" + DIFFUSERS.replace(".", "_")
TEXT = "text_model.encoder.layers.0."
SHAPES = {"attn1.to_q": (12, 12), "attn1.to_v": (12, 12), "attn2.to_q": (12, 12), "attn2.to_k": (12, 768)}

PREFIXES = {
    "kohya": lambda leaf: KOHYA + leaf.replace(".", "_"),
    "diffusers": lambda leaf: f"unet.{DIFFUSERS}{leaf}",
    "bare": lambda leaf: DIFFUSERS + leaf,
    "comfy": lambda leaf: f"diffusion_model.{NATIVE}{leaf}",
    "peft": lambda leaf: f"base_model.model.{DIFFUSERS}{leaf}",
}
SUFFIXES = {
    "kohya": (".lora_up.weight", ".lora_down.weight"),
    "peft": (".lora_B.weight", ".lora_A.weight"),
    "named": (".lora_B.default.weight", ".lora_A.default.weight"),
    "updown": (".lora.up.weight", ".lora.down.weight"),
    "loralib": (".lora_B", ".lora_A"),
}


def factors(shape: tuple[int, int], seed: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    made, _ = make.lora_factors(shape, rank, torch.float32, np.random.default_rng(seed))
    return made["up"], made["down"]


def module(stem: str, suffix: str, shape: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    return {stem + tail: tensor for tail, tensor in zip(SUFFIXES[suffix], factors(shape, seed), strict=True)}


def loaded(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> lt.Adapter:
    make.write_safetensors(path, tensors, metadata)
    return lt.load(path)


def expected(seeds: Mapping[str, int]) -> dict[str, np.ndarray]:
    found = {}
    for leaf, seed in seeds.items():
        up, down = factors(SHAPES[leaf], seed)
        found[f"denoiser/{NATIVE}{leaf}"] = make.f64(up) @ make.f64(down)
    return found


@pytest.mark.parametrize("first", PREFIXES)
@pytest.mark.parametrize("second", PREFIXES)
def test_any_two_prefixes_may_share_a_file(first: str, second: str, tmp_path: Path) -> None:
    seeds = {leaf: seed for seed, leaf in enumerate(SHAPES)}
    tensors: dict[str, torch.Tensor] = {}
    for (leaf, seed), spelling in zip(seeds.items(), (first, second, first, second), strict=True):
        tensors |= module(PREFIXES[spelling](leaf), "peft", SHAPES[leaf], seed)
    adapter = loaded(tmp_path / "a.safetensors", tensors)
    assert (adapter.arch, dict(adapter.extras)) == ("sd15", {})
    make.assert_close(make.deltas_of(adapter), expected(seeds))


@pytest.mark.parametrize("prefix", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    ("first", "second"), [pair for pair in product(SUFFIXES, SUFFIXES) if pair[0] < pair[1]]
)
def test_any_two_suffixes_may_share_a_file(prefix: str, first: str, second: str, tmp_path: Path) -> None:
    seeds = {leaf: seed for seed, leaf in enumerate(SHAPES)}
    tensors: dict[str, torch.Tensor] = {}
    for (leaf, seed), suffix in zip(seeds.items(), (first, second, first, second), strict=True):
        tensors |= module(PREFIXES[prefix](leaf), suffix, SHAPES[leaf], seed)
    adapter = loaded(tmp_path / "a.safetensors", tensors)
    make.assert_close(make.deltas_of(adapter), expected(seeds))


def test_everything_at_once_is_read_and_written_back(tmp_path: Path) -> None:
    tensors = {
        **module(PREFIXES["kohya"]("attn1.to_q"), "kohya", (12, 12), 0),
        PREFIXES["kohya"]("attn1.to_q") + ".alpha": torch.tensor(2),
        **module(PREFIXES["comfy"]("attn2.to_k"), "named", (12, 768), 3),
        PREFIXES["comfy"]("attn2.to_k") + ".alpha": torch.tensor([8.0]),
        **module(PREFIXES["diffusers"]("attn2.to_q"), "loralib", (12, 12), 2),
        f"unet.{DIFFUSERS}attn1.processor.to_v_lora.up.weight": factors((12, 12), 1)[0],
        f"unet.{DIFFUSERS}attn1.processor.to_v_lora.down.weight": factors((12, 12), 1)[1],
        **module(f"text_encoder.{TEXT}self_attn.q_proj", "updown", (16, 16), 4),
        **module(f"lora_te_{TEXT.replace('.', '_')}mlp_fc1", "kohya", (24, 16), 5),
    }
    adapter = loaded(tmp_path / "a.safetensors", tensors)
    scales = {str(target): found.scale for target, found in adapter.modules.items()}
    assert scales == {
        NATIVE + "attn1.to_q": 0.5,
        NATIVE + "attn2.to_k": 2.0,
        NATIVE + "attn2.to_q": 1.0,
        NATIVE + "attn1.to_v": 1.0,
        TEXT + "self_attn.q_proj": 1.0,
        TEXT + "mlp.fc1": 1.0,
    }
    assert (adapter.arch, adapter.notes, dict(adapter.extras)) == ("sd15", (), {})
    lt.save(adapter, tmp_path / "b.safetensors")
    assert make.read_safetensors(tmp_path / "b.safetensors") == make.read_safetensors(
        tmp_path / "a.safetensors"
    )


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(2),
        torch.tensor([2]),
        torch.tensor(2.0),
        torch.tensor([2.0]),
        torch.tensor([[2.0]]),
        torch.tensor(2.0, dtype=torch.float16),
        torch.tensor([2.0], dtype=torch.bfloat16),
        torch.tensor(2.0, dtype=torch.float64),
        torch.tensor(2, dtype=torch.int16),
    ],
    ids=lambda alpha: f"{alpha.dtype}-{list(alpha.shape)}".removeprefix("torch."),
)
def test_an_alpha_is_a_number_in_any_clothes(alpha: torch.Tensor, tmp_path: Path) -> None:
    stem = PREFIXES["kohya"]("attn2.to_k")
    adapter = loaded(
        tmp_path / "a.safetensors", module(stem, "kohya", (12, 768), 0) | {f"{stem}.alpha": alpha}
    )
    (found,) = adapter.modules.values()
    assert (found.alpha, found.scale) == (2.0, 0.5)
    lt.save(adapter, tmp_path / "b.safetensors")
    assert make.read_safetensors(tmp_path / "b.safetensors") == make.read_safetensors(
        tmp_path / "a.safetensors"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_alpha_that_is_no_number_is_noted_and_can_be_refused(value: float, tmp_path: Path) -> None:
    stem = PREFIXES["kohya"]("attn2.to_k")
    tensors = module(stem, "kohya", (12, 768), 0) | {f"{stem}.alpha": torch.tensor(value)}
    tensors |= module(PREFIXES["kohya"]("attn1.to_q"), "kohya", (12, 12), 1)
    adapter = loaded(tmp_path / "a.safetensors", tensors)
    assert any(f"{stem}.alpha" in note for note in adapter.notes)
    assert any(f"{stem}.alpha" in warning for warning in lt.info(tmp_path / "a.safetensors").warnings)
    with pytest.raises(NonFiniteError, match="1 of 2 modules") as caught:
        refuse_nonfinite(adapter)
    assert caught.value.keys == (f"{stem}.alpha",)
    with pytest.raises(NonFiniteError):
        lt.merge([adapter])


def test_finite_alphas_are_not_refused(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors")
    refuse_nonfinite(lt.load(made.path))
    assert not lt.load(made.path).notes


# Two spellings of one weight


@pytest.mark.parametrize(
    ("first", "second"), [pair for pair in product(PREFIXES, PREFIXES) if pair[0] < pair[1]]
)
def test_two_spellings_of_one_weight_are_refused_with_both_keys(
    first: str, second: str, tmp_path: Path
) -> None:
    stems = [PREFIXES[first]("attn2.to_k"), PREFIXES[second]("attn2.to_k")]
    tensors = module(stems[0], "kohya", (12, 768), 0) | module(stems[1], "peft", (12, 768), 1)
    with pytest.raises(NameResolutionError, match="two modules name") as caught:
        loaded(tmp_path / "a.safetensors", tensors)
    assert set(caught.value.keys) == set(stems)


FLUX = {"ss_base_model_version": "flux1"}
FUSED = "lora_unet_double_blocks_0_img_attn_qkv"
PART = "transformer.transformer_blocks.0.attn.to_{}"


def flux(*stems: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for seed, stem in enumerate(stems):
        tensors |= module(stem, "peft", (24 if "qkv" in stem else 8, 8), seed)
    return tensors


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_fused_weight_beside_one_of_its_parts_is_refused(part: str, tmp_path: Path) -> None:
    for stems in ((FUSED, PART.format(part)), (PART.format(part), FUSED)):
        make.write_safetensors(tmp_path / "a.safetensors", flux(*stems), FLUX)
        with pytest.raises(NameResolutionError, match="two modules name") as caught:
            lt.load(tmp_path / "a.safetensors", arch="flux")
        assert caught.value.keys == stems


def test_parts_that_do_not_overlap_are_read(tmp_path: Path) -> None:
    stems = [*(PART.format(part) for part in "qkv"), "lora_unet_double_blocks_1_img_attn_qkv"]
    make.write_safetensors(tmp_path / "a.safetensors", flux(*stems), FLUX)
    assert len(lt.load(tmp_path / "a.safetensors", arch="flux").modules) == 4
