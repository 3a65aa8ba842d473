"""Names as each layout writes them: golden ones for each architecture, and none where a layout has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools import formats
from loratools.errors import LayoutError
from loratools.formats import _parse, _spell, _suffixes
from loratools.model import Adapter, Layout, Module, Target
from loratools.tensors import from_torch


def spelt(adapter: Adapter, layout: str, variant: str = "") -> formats.Document:
    """The adapter named anew, even in its own layout."""
    return formats.document(replace(adapter, order=()), Layout(layout, variant), formats.get(layout))


def stems(document: formats.Document) -> set[str]:
    """The module names of what is written, each tensor taken apart by the reader's own rules."""
    parts = [_parse.split(ref.name) for ref in document.tensors]
    assert all(part is not None for part in parts)
    return {part.stem for part in parts if part is not None}


def adapter_of(arch: str, folder: Path, *, split: bool = False, only: list[str] | None = None) -> Adapter:
    """Flux's fused weights as Kohya has them or apart; the other models' are alike in both."""
    if split:
        return lt.load(make.diffusers(folder / "d.safetensors", arch, only=only).path, arch=arch)
    return lt.load(make.kohya(folder / "k.safetensors", arch, alpha=None, only=only).path, arch=arch)


def flat(weight: make.Weight, unet: str) -> str:
    """A diffusers name flattened behind a denoiser's prefix; text encoders are spelt as in Kohya's files."""
    return weight.kohya if weight.kohya.startswith("lora_te") else unet + _body(weight).replace(".", "_")


def _body(weight: make.Weight) -> str:
    return weight.diffusers.partition(".")[2]


_FLUX_TE = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.mark.parametrize("arch", ["sd15", "sdxl", "flux"])
def test_kohyas_names(arch: str, tmp_path: Path) -> None:
    found = stems(spelt(adapter_of(arch, tmp_path), "kohya"))
    assert found == {weight.kohya for weight in make.KOHYA_WEIGHTS[arch]}


@pytest.mark.parametrize("arch", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("layout", ["diffusers", "ai-toolkit"])
def test_names_with_diffusers_prefixes(layout: str, arch: str, tmp_path: Path) -> None:
    found = stems(spelt(adapter_of(arch, tmp_path, split=True), layout))
    assert found == {weight.diffusers for weight in make.DIFFUSERS_WEIGHTS[arch]}


@pytest.mark.parametrize("arch", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize(
    ("layout", "unet", "transformer"),
    [("lycoris", "lycoris_", "lycoris_"), ("onetrainer", "lora_unet_", "lora_transformer_")],
)
def test_flattened_diffusers_names(
    layout: str, unet: str, transformer: str, arch: str, tmp_path: Path
) -> None:
    found = stems(spelt(adapter_of(arch, tmp_path, split=True), layout))
    if arch == "flux":
        denoiser = [weight for weight in make.FLUX_SPLIT if weight.component == "denoiser"]
        assert found == {_FLUX_TE, *(transformer + _body(weight).replace(".", "_") for weight in denoiser)}
    else:
        assert found == {flat(weight, unet) for weight in make.DIFFUSERS_WEIGHTS[arch]}


@pytest.mark.parametrize("arch", ["sd15", "sdxl", "flux"])
def test_comfys_names_are_the_checkpoints(arch: str, tmp_path: Path) -> None:
    adapter = adapter_of(arch, tmp_path, only=["lora_unet_", "lora_te_", "lora_te1_"])
    prefixes = {"denoiser": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer."}
    expected = {
        prefixes[weight.component] + weight.target
        for weight in make.KOHYA_WEIGHTS[arch]
        if weight.component in prefixes
    }
    assert stems(spelt(adapter, "comfy")) == expected


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_pefts_names_are_diffusers_own(arch: str, tmp_path: Path) -> None:
    adapter = adapter_of(arch, tmp_path, only=["lora_unet_"])
    denoiser = [weight for weight in make.KOHYA_WEIGHTS[arch] if weight.component == "denoiser"]
    assert stems(spelt(adapter, "peft")) == {f"base_model.model.{_body(weight)}" for weight in denoiser}


def test_a_few_names_written_out(tmp_path: Path) -> None:
    only = ["input_blocks_4_1_transformer_blocks_0_attn1_to_q"]
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", alpha=None, only=only)
    unet = lt.load(made.path, arch="sdxl")
    expected = {
        "kohya": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight",
        "lycoris": "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
        "onetrainer": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
        "comfy": "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_B.weight",
        "diffusers": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight",
        "ai-toolkit": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight",
        "peft": "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight",
    }
    for layout, name in expected.items():
        names = {ref.name for ref in spelt(unet, layout).tensors}
        assert name in names, layout


@pytest.mark.parametrize(
    "layout", ["kohya", "lycoris", "onetrainer", "comfy", "diffusers", "ai-toolkit", "peft"]
)
def test_what_is_written_is_read_as_the_same_weights(layout: str, tmp_path: Path) -> None:
    """Flux in its dialect's own grain: fused for the checkpoint's names, apart for diffusers'."""
    native = layout in ("kohya", "comfy")
    only = ["lora_unet_"] if native else ["transformer."]
    adapter = adapter_of("flux", tmp_path, split=not native, only=only)
    found = spelt(adapter, layout)
    refs = {ref.name: ref for ref in found.tensors}
    again = formats.read(refs, metadata=found.metadata, config=found.config or {}, arch="flux")
    assert again.layout.name in (layout, *formats.get(layout).reads_as)
    make.assert_close(make.deltas_of(again), make.deltas_of(adapter))


def test_musubi_has_no_names_for_models_it_does_not_train(tmp_path: Path) -> None:
    for arch in ("sd15", "sdxl"):
        with pytest.raises(LayoutError, match=r"musubi layout cannot hold the denoiser of Stable Diffusion"):
            spelt(adapter_of(arch, tmp_path, only=["lora_unet_"]), "musubi")
    made = make.kohya(tmp_path / "te.safetensors", "sd15", only=["lora_te_"])
    encoder = lt.load(made.path, arch="sd15")
    with pytest.raises(LayoutError, match="the text_encoder of"):
        spelt(encoder, "musubi")


def bare(component: str, path: str, arch: str = "unknown", **fields: object) -> Adapter:
    """One module at rank 2, scale 1, that came from no file."""
    up, down = from_torch("", torch.ones(6, 2)), from_torch("", torch.ones(2, 4))
    module = Module(Target(component, path), "lora", {"up": up, "down": down}, rank=2, shape=(6, 4))
    module = module._replace(**fields)
    return Adapter({module.target: module}, arch=arch, layout=Layout("diffusers", "peft-keys"))


@pytest.mark.parametrize(
    ("layout", "stem"),
    [
        ("kohya", "lora_unet_tower_0_gate"),
        ("musubi", "lora_unet_tower_0_gate"),
        ("lycoris", "lycoris_tower_0_gate"),
        ("onetrainer", "lora_transformer_tower_0_gate"),
        ("comfy", "diffusion_model.tower.0.gate"),
        ("ai-toolkit", "transformer.tower.0.gate"),
        ("diffusers", "transformer.tower.0.gate"),
        ("peft", "base_model.model.tower.0.gate"),
    ],
)
def test_names_that_nobody_has_described_stay_as_they_are(layout: str, stem: str) -> None:
    assert stems(spelt(bare("denoiser", "tower.0.gate"), layout)) == {stem}


@pytest.mark.parametrize("layout", ["comfy", "ai-toolkit", "diffusers", "peft"])
def test_dots_that_were_replaced_need_the_base(layout: str) -> None:
    with pytest.raises(LayoutError, match="--base") as caught:
        spelt(bare("denoiser", "tower_0_gate"), layout)
    assert caught.value.keys == ("tower_0_gate",)
    assert stems(spelt(bare("denoiser", "tower_0_gate"), "kohya")) == {"lora_unet_tower_0_gate"}


def test_an_undescribed_text_encoder_keeps_its_number(tmp_path: Path) -> None:
    """Whether a model has one or several encoders only its own keys tell."""
    stem = "lora_te1_tower_0_gate"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}
    make.write_safetensors(tmp_path / "a.safetensors", tensors, None)
    adapter = lt.load(tmp_path / "a.safetensors")
    assert stems(spelt(adapter, "kohya")) == {stem}


@pytest.mark.parametrize(
    "layout", ["kohya", "lycoris", "musubi", "onetrainer", "comfy", "ai-toolkit", "diffusers"]
)
def test_a_language_model_goes_to_peft(layout: str) -> None:
    adapter = bare("language_model", "model.layers.0.mlp.down_proj", "llm")
    with pytest.raises(LayoutError, match="a language_model"):
        spelt(adapter, layout)
    assert stems(spelt(adapter, "peft")) == {"base_model.model.model.layers.0.mlp.down_proj"}


def test_old_diffusers_generations_keep_their_suffixes(tmp_path: Path) -> None:
    adapter = adapter_of("sd15", tmp_path, split=True)
    for variant, tail in (("lora-updown", ".lora.up.weight"), ("peft-keys", ".lora_B.weight")):
        assert [ref for ref in spelt(adapter, "diffusers", variant).tensors if ref.name.endswith(tail)]
    bare_names = spelt(adapter_of("sd15", tmp_path, split=True, only=["unet."]), "diffusers", "no-prefix")
    assert not [ref for ref in bare_names.tensors if ref.name.startswith("unet.")]


def test_every_suffix_is_read_as_its_role() -> None:
    for table in (_spell.FLATTENED, _suffixes.PEFT, _suffixes.OFT_R):
        for role, suffix in table.items():
            if role == "ia3_weight":  # told by the flag beside it, not by its own name
                continue
            part = _parse.split(f"stem.{suffix}")
            assert part is not None
            assert (part.stem, part.suffix.role) == ("stem", role)


def test_every_role_of_kohya_and_lycoris_has_a_suffix() -> None:
    styles = {suffix.role for suffix in _parse._SUFFIXES.values() if suffix.style in ("kohya", "lycoris")}
    assert styles - {"magnitude"} <= _spell.FLATTENED.keys()


def test_a_malformed_file_is_respelt_unless_it_is_copied(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", only=["lora_unet_"])
    doubled = {key.replace("lora_unet_", "lora_unet_unet_"): value for key, value in made.tensors.items()}
    make.write_safetensors(tmp_path / "b.safetensors", doubled, None)
    adapter = lt.load(tmp_path / "b.safetensors")
    form = formats.get("kohya")
    copied = formats.document(adapter, adapter.layout, form)
    assert {ref.name for ref in copied.tensors} == set(doubled)
    anew = formats.document(adapter, Layout("kohya"), form)
    assert {ref.name for ref in anew.tensors} == set(made.tensors)


def clip_alone(tmp_path: Path) -> Path:
    """A text encoder that many architectures have, in diffusers' names."""
    made = make.kohya(tmp_path / "a.safetensors", "sd15", only=["te_"])
    lt.save(lt.load(made.path, arch="sd15"), tmp_path / "b.safetensors", layout="diffusers")
    return tmp_path / "b.safetensors"


@pytest.mark.parametrize("layout", ["kohya", "onetrainer", "lycoris"])
def test_a_text_encoder_of_several_architectures_is_not_guessed_at(layout: str, tmp_path: Path) -> None:
    path = clip_alone(tmp_path)
    assert lt.load(path).arch == "unknown"
    with pytest.raises(LayoutError, match="unknown architecture") as caught:
        spelt(lt.load(path), layout)
    assert {"sd15", "sdxl", "flux"} <= set(caught.value.todo.rpartition(" ")[2].split("|"))
    for arch, prefix in (("sd15", "lora_te_"), ("sdxl", "lora_te1_")):
        written = stems(spelt(lt.load(path, arch=arch), layout))
        assert written
        assert all(stem.startswith(prefix) for stem in written)
    # All of them have one name for it there.
    assert spelt(lt.load(path), "diffusers").tensors


@pytest.mark.parametrize("layout", ["kohya", "onetrainer", "lycoris"])
def test_a_text_encoder_of_several_architectures_keeps_the_prefix_that_it_has(
    layout: str, tmp_path: Path
) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", only=["te_"])
    adapter = lt.load(made.path)
    assert adapter.arch == "unknown"
    assert all(stem.startswith("lora_te_") for stem in stems(spelt(adapter, layout)))
