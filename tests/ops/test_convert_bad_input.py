"""Inputs that go wrong in the ways that files do: what is said, and that nothing is written."""

from __future__ import annotations

from pathlib import Path

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt
from loratools.errors import LayoutError, LoraError, NameResolutionError, NonFiniteError
from loratools.ops.convert import convert_file

KOHYA_TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
UNET_TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
QKV = "double_blocks.0.img_attn.qkv"


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "x.safetensors"


def write(path: Path, names: list[str], ends: tuple[str, str], out: int = 8, inner: int = 6) -> Path:
    down, up = ends
    tensors = {}
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        tensors[f"{name}.{down}"] = torch.randn(2, inner, generator=generator)
        tensors[f"{name}.{up}"] = torch.randn(out, 2, generator=generator)
    make.write_safetensors(path, tensors, {})
    return path


PEFT_ENDS = ("lora_A.weight", "lora_B.weight")
KOHYA_ENDS = ("lora_down.weight", "lora_up.weight")


def test_two_layouts_on_one_module_are_refused(tmp_path, out):
    made = make.kohya(tmp_path / "a.safetensors", "sd15")
    twin = {f"{UNET_TO_Q}.lora_A.weight": torch.ones(4, 12), f"{UNET_TO_Q}.lora_B.weight": torch.ones(12, 4)}
    make.write_safetensors(tmp_path / "b.safetensors", made.tensors | twin, {})
    with pytest.raises(LoraError) as caught:
        convert_file(tmp_path / "b.safetensors", out, to="diffusers")
    assert isinstance(caught.value, NameResolutionError)
    assert any(key.startswith(KOHYA_TO_Q) for key in caught.value.keys)
    assert any(key.startswith(UNET_TO_Q) for key in caught.value.keys)
    assert not list(out.parent.iterdir())


def test_a_fused_weight_and_its_part_are_refused(tmp_path, out):
    made = make.kohya(tmp_path / "a.safetensors", "flux")
    part = "transformer.transformer_blocks.0.attn.to_k"
    twin = {f"{part}.lora_A.weight": torch.ones(4, 8), f"{part}.lora_B.weight": torch.ones(8, 4)}
    make.write_safetensors(tmp_path / "b.safetensors", made.tensors | twin, {})
    with pytest.raises(NameResolutionError, match=QKV) as caught:
        convert_file(tmp_path / "b.safetensors", out, to="diffusers")
    assert {key.partition(".lora")[0] for key in caught.value.keys} == {
        "lora_unet_double_blocks_0_img_attn_qkv",
        part,
    }
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("missing", ["to_q", "to_k", "to_v"])
def test_a_missing_member_of_a_fused_weight_is_zero(missing, tmp_path, out):
    members = [part for part in ("to_q", "to_k", "to_v") if part != missing]
    names = [f"transformer_blocks.0.attn.{part}" for part in (*members, "to_out.0")]
    made = make.diffusers(tmp_path / "a.safetensors", "flux", only=names)
    report = convert_file(made.path, out, to="kohya")
    assert f"{QKV}: 1 of 3 shares of its rows have no module; they are zero" in report.notes
    place = ["to_q", "to_k", "to_v"].index(missing)
    delta = make.whole(lt.load(out, arch="flux"))[f"denoiser/{QKV}"]
    thirds = np.split(delta, 3)
    assert not thirds[place].any()
    assert all(third.any() for number, third in enumerate(thirds) if number != place)
    back = tmp_path / "back.safetensors"
    convert_file(out, back, to="diffusers", arch="flux")
    assert make.read_safetensors(back)[0] == make.read_safetensors(made.path)[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("to", ["kohya", "diffusers", "ai-toolkit"])
def test_an_alpha_that_is_no_number_is_refused(value, to, tmp_path, out):
    made = make.kohya(tmp_path / "a.safetensors", "sd15", alphas={"attn1_to_q": value})
    with pytest.raises(NonFiniteError) as caught:
        convert_file(made.path, out, to=to)
    assert f"{KOHYA_TO_Q}.alpha" in caught.value.keys
    assert not list(out.parent.iterdir())


NAMES = ["tower.stage_a.0.gate", "tower.stage_b.1.gate"]


@pytest.mark.parametrize(("prefix", "to", "written"), [
    ("base_model.model.", "peft", "base_model.model."),
    ("base_model.model.", "loralib", ""),
    ("diffusion_model.", "comfy", "diffusion_model."),
    ("diffusion_model.", "diffusers", "transformer."),
    ("diffusion_model.", "peft", "base_model.model."),
    ("transformer.", "comfy", "diffusion_model."),
])  # fmt: skip
def test_names_nobody_described_stay_where_the_layout_has_dots(prefix, to, written, tmp_path, out):
    source = write(tmp_path / "a.safetensors", [prefix + name for name in NAMES], PEFT_ENDS)
    target = out.with_suffix("") if to == "peft" else out
    convert_file(source, target, to=to)
    file = target / "adapter_model.safetensors" if to == "peft" else target
    stems = {key.partition(".lora_")[0].removesuffix(".alpha") for key in make.read_safetensors(file)[0]}
    assert stems == {written + name for name in NAMES}
    before, after = (lt.load(path).modules.values() for path in (source, target))
    assert [module.delta().tolist() for module in after] == [module.delta().tolist() for module in before]


@pytest.mark.parametrize("to", ["peft", "comfy", "diffusers", "loralib"])
def test_flattened_names_nobody_described_need_the_base(to, tmp_path, out):
    flat = ["lora_unet_" + name.replace(".", "_") for name in NAMES]
    source = write(tmp_path / "a.safetensors", flat, KOHYA_ENDS)
    with pytest.raises(LayoutError, match="--base") as caught:
        convert_file(source, out.with_suffix("") if to == "peft" else out, to=to)
    assert set(caught.value.keys) == {f"{name}.{end}" for name in flat for end in KOHYA_ENDS}
    assert not list(out.parent.iterdir())


def test_flattened_names_stay_where_they_are_flattened_again(tmp_path, out):
    flat = ["lora_unet_" + name.replace(".", "_") for name in NAMES]
    source = write(tmp_path / "a.safetensors", flat, KOHYA_ENDS)
    convert_file(source, out, to="lycoris")
    stems = {key.partition(".")[0] for key in make.read_safetensors(out)[0]}
    assert stems == {name.replace("lora_unet_", "lycoris_") for name in flat}


def test_a_language_model_in_a_layout_of_image_models_is_refused(tmp_path, out):
    made = make.peft(tmp_path / "a")
    with pytest.raises(LayoutError, match="language_model") as caught:
        convert_file(made.path, out, to="kohya")
    assert set(caught.value.keys) == made.tensors.keys()
    assert not list(out.parent.iterdir())


def test_keys_of_a_refusal_are_told_once(tmp_path, out):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    made = make.kohya(tmp_path / "a.safetensors", "flux", extra={f"{name}.diff_b": torch.ones(24)})
    with pytest.raises(LayoutError) as caught:
        convert_file(made.path, out, to="ai-toolkit")
    assert caught.value.keys == (f"{name}.diff_b",)


def test_a_factor_that_is_missing_is_named(tmp_path, out):
    made = make.kohya(tmp_path / "a.safetensors", "sd15")
    tensors = {key: each for key, each in made.tensors.items() if key != f"{KOHYA_TO_Q}.lora_up.weight"}
    make.write_safetensors(tmp_path / "b.safetensors", tensors, {})
    with pytest.raises(LoraError, match=KOHYA_TO_Q):
        convert_file(tmp_path / "b.safetensors", out, to="diffusers")
    assert not list(out.parent.iterdir())
