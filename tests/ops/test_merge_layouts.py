"""Merging across layouts and dialects: exact in ΔW, spelt as the result's layout spells it."""

from __future__ import annotations

from pathlib import Path

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt
from loratools.errors import LayoutError, NameResolutionError


def _sum(weights: tuple[float, ...], *adapters: lt.Adapter) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for weight, adapter in zip(weights, adapters, strict=True):
        for key, delta in make.whole(adapter).items():
            found[key] = found.get(key, 0.0) + weight * delta
    return found


def _stems(path: Path) -> set[str]:
    tensors, _ = make.read_safetensors(path)
    return {key.split(".lora_")[0].removesuffix(".alpha") for key in tensors}


WEIGHTS = (0.75, -0.5)


@pytest.mark.parametrize("method", ["linear", "concat"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("arch", ["sd15", "sdxl", "flux"])
def test_kohya_and_diffusers_into_either(arch: str, layout: str, method: str, tmp_path: Path) -> None:
    kohya = lt.load(make.kohya(tmp_path / "a.safetensors", arch, seed=1, alpha=3.0).path)
    diffusers = lt.load(make.diffusers(tmp_path / "b.safetensors", arch, seed=2, rank=3).path)
    merged = lt.merge([kohya, diffusers], weights=WEIGHTS, layout=layout, method=method)
    output = tmp_path / "m.safetensors"
    lt.save(merged, output)
    table = make.KOHYA_WEIGHTS if layout == "kohya" else make.DIFFUSERS_WEIGHTS
    assert _stems(output) == {getattr(weight, layout) for weight in table[arch]}
    again = lt.load(output)
    assert (again.layout.name, again.arch) == (layout, arch)
    make.assert_close(make.whole(again), _sum(WEIGHTS, kohya, diffusers), 5e-6)


def test_the_layout_is_the_first_inputs_unless_it_is_asked_for(tmp_path: Path) -> None:
    kohya = lt.load(make.kohya(tmp_path / "a.safetensors", "sdxl").path)
    diffusers = lt.load(make.diffusers(tmp_path / "b.safetensors", "sdxl").path)
    assert lt.merge([kohya, diffusers]).layout.name == "kohya"
    assert lt.merge([diffusers, kohya]).layout.name == "diffusers"


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("source", ["kohya", "diffusers"])
def test_one_flux_file_into_either_layout_at_weight_one(source: str, layout: str, tmp_path: Path) -> None:
    maker = {"kohya": make.kohya, "diffusers": make.diffusers}[source]
    adapter = lt.load(maker(tmp_path / "a.safetensors", "flux").path)
    lt.save(lt.merge([adapter], layout=layout), tmp_path / "m.safetensors")
    table = make.FLUX_FUSED if layout == "kohya" else make.FLUX_SPLIT
    assert _stems(tmp_path / "m.safetensors") == {getattr(weight, layout) for weight in table}
    make.assert_close(make.whole(lt.load(tmp_path / "m.safetensors")), make.whole(adapter))


def test_splitting_flux_shares_the_rank(tmp_path: Path) -> None:
    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "flux", rank=4).path)
    merged = lt.merge([adapter], layout="diffusers")
    assert {module.rank for module in merged.modules.values()} == {4}


def test_a_file_with_q_alone_fuses_with_zeros_for_k_and_v(tmp_path: Path) -> None:
    made = make.diffusers(tmp_path / "a.safetensors", "flux", only=["transformer_blocks.0.attn.to_q", "ff"])
    adapter = lt.load(made.path)
    lt.save(lt.merge([adapter], layout="kohya"), tmp_path / "m.safetensors")
    again = lt.load(tmp_path / "m.safetensors")
    make.assert_close(make.whole(again), make.whole(adapter))
    qkv = make.whole(again)["denoiser/double_blocks.0.img_attn.qkv"]
    assert qkv[:8].any()
    assert not qkv[8:].any()


def test_norm_outs_halves_are_exchanged(tmp_path: Path) -> None:
    """diffusers has (scale, shift) where the checkpoint has (shift, scale)."""
    made = make.diffusers(tmp_path / "a.safetensors", "flux", only=["norm_out", "ff", "to_out", "proj_out"])
    lt.save(lt.merge([lt.load(made.path)], layout="kohya"), tmp_path / "m.safetensors")
    written = make.deltas_of(lt.load(tmp_path / "m.safetensors"))["denoiser/final_layer.adaLN_modulation.1"]
    told = made.deltas["denoiser/final_layer.adaLN_modulation.1[1:2+0:1/2]"]
    np.testing.assert_allclose(written, np.concatenate([told[8:], told[:8]]), atol=1e-6)


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_a_merge_of_kohya_files_has_kohyas_keys_exactly(arch: str, tmp_path: Path) -> None:
    one = make.kohya(tmp_path / "a.safetensors", arch, seed=1)
    two = make.kohya(tmp_path / "b.safetensors", arch, seed=2)
    lt.save(lt.merge([lt.load(one.path), lt.load(two.path)], weights=[0.5, 0.5]), tmp_path / "m.safetensors")
    new, _ = make.read_safetensors(tmp_path / "m.safetensors")
    assert set(new) == set(one.tensors)
    assert list(new) == sorted(new)


@pytest.mark.parametrize("mids", [(True, True), (True, False)])
def test_tucker_convolutions_merge_with_any(mids: tuple[bool, bool], tmp_path: Path) -> None:
    adapters = [
        lt.load(make.kohya(tmp_path / f"{number}.safetensors", "sd15", seed=number, mid=mid).path)
        for number, mid in enumerate(mids)
    ]
    lt.save(lt.merge(adapters, weights=WEIGHTS), tmp_path / "m.safetensors")
    again = lt.load(tmp_path / "m.safetensors")
    make.assert_close(make.whole(again), _sum(WEIGHTS, *adapters))
    convolution = next(m for m in again.modules.values() if m.shape[2:] == (3, 3))
    assert (len(convolution.factors["up"].shape), len(convolution.factors["down"].shape)) == (4, 4)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_tucker_convolution_alone_goes_into_any_layout(layout: str, tmp_path: Path) -> None:
    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "sd15", mid=True).path)
    lt.save(lt.merge([adapter], layout=layout), tmp_path / "m.safetensors")
    make.assert_close(make.whole(lt.load(tmp_path / "m.safetensors")), make.whole(adapter))


def test_peft_folders_with_rslora_and_patterns(tmp_path: Path) -> None:
    one = make.peft(tmp_path / "a", seed=1, rank=4, alpha=8, config={"use_rslora": True})
    two = make.peft(
        tmp_path / "b",
        seed=2,
        rank=2,
        alpha=3,
        ranks={"model.layers.0.mlp.down_proj": 5},
        dtype=torch.bfloat16,
    )
    adapters = [lt.load(one.path), lt.load(two.path)]
    lt.save(lt.merge(adapters, weights=WEIGHTS), tmp_path / "m")
    again = lt.load(tmp_path / "m")
    assert not again.notes
    make.assert_close(make.whole(again), _sum(WEIGHTS, *adapters), 2e-6)
    assert again.config["use_rslora"] is False


def test_embeddings_and_conv1d_keep_their_orientation(tmp_path: Path) -> None:
    one = make.peft(tmp_path / "a", seed=1, embedding=True)
    two = make.peft(tmp_path / "b", seed=2, embedding=True)
    adapters = [lt.load(one.path), lt.load(two.path)]
    lt.save(lt.merge(adapters, weights=WEIGHTS), tmp_path / "m")
    tensors, _ = make.read_safetensors(tmp_path / "m" / "adapter_model.safetensors")
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    assert tensors[stem + "A"][1] == (8, 20)
    assert tensors[stem + "B"][1] == (16, 8)
    make.assert_close(make.whole(lt.load(tmp_path / "m")), _sum(WEIGHTS, *adapters))
    gpt = make.peft(tmp_path / "g", make.GPT2, config={"fan_in_fan_out": True})
    lt.save(lt.merge([lt.load(gpt.path)], weights=[2]), tmp_path / "h")
    assert lt.load(tmp_path / "h").config["fan_in_fan_out"] is True


@pytest.mark.parametrize("form", ["named", "double", "fsdp", "compiled", "no_prefix"])
def test_a_merge_of_odd_spellings_is_written_canonically(form: str, tmp_path: Path) -> None:
    odd = make.peft(tmp_path / "a", form=form)
    lt.save(lt.merge([lt.load(odd.path)], weights=[1]), tmp_path / "m")
    tensors, _ = make.read_safetensors(tmp_path / "m" / "adapter_model.safetensors")
    plain = make.peft(tmp_path / "b")
    assert set(tensors) == set(plain.tensors)
    make.assert_close(make.deltas_of(lt.load(tmp_path / "m")), odd.deltas)


@pytest.mark.parametrize(
    ("generation", "prefix"),
    [("attn-procs", True), ("lora-updown", True), ("peft-keys", False), ("attn-procs", False)],
)
def test_a_merge_of_old_diffusers_files_is_read_again(generation: str, prefix: bool, tmp_path: Path) -> None:
    one = make.diffusers(tmp_path / "a.safetensors", "sd15", generation=generation, prefix=prefix, seed=1)
    two = make.diffusers(tmp_path / "b.safetensors", "sd15", seed=2, only=["unet."])
    adapters = [lt.load(one.path), lt.load(two.path)]
    lt.save(lt.merge(adapters, weights=WEIGHTS), tmp_path / "m.safetensors")
    again = lt.load(tmp_path / "m.safetensors")
    assert again.layout.name == "diffusers"
    make.assert_close(make.whole(again), _sum(WEIGHTS, *adapters))


def test_a_malformed_kohya_file_is_merged_into_a_sound_one(tmp_path: Path) -> None:
    plain = make.kohya(tmp_path / "p.safetensors", "sd15", alpha=None, only=["attn", "ff"])
    tensors = {
        key.replace("lora_unet_", "lora_unet_unet_").replace(".lora_", "_lora_"): tensor
        for key, tensor in plain.tensors.items()
        if key.startswith("lora_unet_")
    }
    make.write_safetensors(tmp_path / "a.safetensors", tensors, None)
    lt.save(lt.merge([lt.load(tmp_path / "a.safetensors")], weights=[1]), tmp_path / "m.safetensors")
    new, _ = make.read_safetensors(tmp_path / "m.safetensors")
    denoiser = {key for key in plain.tensors if key.startswith("lora_unet_")}
    assert denoiser <= set(new)
    assert not [key for key in new if "unet_unet" in key]


def test_mlx_and_peft_of_one_model(tmp_path: Path) -> None:
    one, two = make.mlx(tmp_path / "a", scale=2.0, seed=1), make.peft(tmp_path / "b", seed=2)
    adapters = [lt.load(two.path), lt.load(one.path)]
    lt.save(lt.merge(adapters, weights=WEIGHTS), tmp_path / "m")
    make.assert_close(make.whole(lt.load(tmp_path / "m")), _sum(WEIGHTS, *adapters))


def test_a_file_of_unclear_architecture_follows_the_other(tmp_path: Path) -> None:
    unclear = lt.load(make.kohya(tmp_path / "a.safetensors", "sd15", only=["attn1"], seed=1).path)
    clear = lt.load(make.kohya(tmp_path / "b.safetensors", "sd15", seed=2).path)
    assert (unclear.arch, clear.arch) == ("unknown", "sd15")
    merged = lt.merge([clear, unclear], weights=[1, 1])
    # Written as one file: no weight may be there twice under two names.
    lt.save(merged, tmp_path / "m.safetensors")
    again = lt.load(tmp_path / "m.safetensors")
    assert len(again.modules) == len(clear.modules)
    expected = lt.load(tmp_path / "a.safetensors", arch="sd15")
    make.assert_close(make.whole(again), _sum((1.0, 1.0), clear, expected))


def test_a_bare_denoiser_merged_with_a_text_encoder_keeps_them_apart(tmp_path: Path) -> None:
    """Without prefixes a second component has no name of its own: then prefixes have to be written."""
    bare = lt.load(make.diffusers(tmp_path / "a.safetensors", "sdxl", prefix=False, seed=1, rank=4).path)
    full = lt.load(
        make.diffusers(
            tmp_path / "b.safetensors",
            "sdxl",
            seed=2,
            rank=2,
            header={"unet": {"r": 2, "lora_alpha": 8}, "text_encoder": {"r": 2, "lora_alpha": 3}},
        ).path
    )
    assert bare.layout.variant == "no-prefix"
    expected = _sum(WEIGHTS, bare, full)
    lt.save(lt.merge([bare, full], weights=WEIGHTS), tmp_path / "m.safetensors")
    make.assert_close(make.whole(lt.load(tmp_path / "m.safetensors")), expected)


def test_carried_and_computed_modules_have_one_prefix(tmp_path: Path) -> None:
    plain = make.kohya(tmp_path / "p.safetensors", "sd15")
    spelt = {
        key.replace("lora_unet_", "lycoris_"): tensor
        for key, tensor in plain.tensors.items()
        if key.startswith("lora_unet_")
    }
    make.write_safetensors(tmp_path / "a.safetensors", spelt, None)
    other = make.kohya(
        tmp_path / "b.safetensors", "sd15", seed=1, only=["lora_unet_down_blocks_0_attentions"]
    )
    first, second = lt.load(tmp_path / "a.safetensors"), lt.load(other.path)
    assert first.layout.variant == "lycoris"
    lt.save(lt.merge([first, second]), tmp_path / "m.safetensors")
    new, _ = make.read_safetensors(tmp_path / "m.safetensors")
    assert len({key.split("_")[0] for key in new}) == 1
    make.assert_close(make.whole(lt.load(tmp_path / "m.safetensors")), _sum((1.0, 1.0), first, second))


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_native_comfy_file_is_merged_into_layouts_that_can_be_written(layout: str, tmp_path: Path) -> None:
    fused = make.kohya(tmp_path / "k.safetensors", "flux", alpha=None, only=["lora_unet_"])
    spelt = {}
    for weight in make.FLUX_FUSED:
        for role, factor in (("down", "lora_A"), ("up", "lora_B")):
            tensor = fused.tensors.get(f"{weight.kohya}.lora_{role}.weight")
            if tensor is not None:
                spelt[f"diffusion_model.{weight.target}.{factor}.weight"] = tensor
    make.write_safetensors(tmp_path / "a.safetensors", spelt, None)
    adapter = lt.load(tmp_path / "a.safetensors")
    lt.save(lt.merge([adapter], layout=layout), tmp_path / "m.safetensors")
    make.assert_close(make.whole(lt.load(tmp_path / "m.safetensors")), make.whole(adapter))


def test_kohya_dora_and_plain_modules_in_one_file_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    plain = make.kohya(tmp_path / "a.safetensors", "sdxl")
    dora = make.kohya(tmp_path / "b.safetensors", "sdxl", dora="out", only=["attn1_to_q"])
    mixed = {**plain.tensors, **{key: tensor for key, tensor in dora.tensors.items() if "dora_scale" in key}}
    make.write_safetensors(tmp_path / "c.safetensors", mixed, None)
    with pytest.raises(lt.LoraError, match="1 modules are DoRA") as caught:
        lt.merge([lt.load(plain.path), lt.load(tmp_path / "c.safetensors")])
    assert caught.value.path == str(tmp_path / "c.safetensors")
    assert caught.value.keys == ("input_blocks.4.1.transformer_blocks.0.attn1.to_q",)


def test_torch_threads_are_left_as_they_were(tmp_path: Path) -> None:
    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "sdxl").path)
    before = torch.get_num_threads()
    lt.merge([adapter, adapter])
    assert torch.get_num_threads() == before


def test_alpha_is_stated_once_in_a_merged_diffusers_file(tmp_path: Path) -> None:
    """diffusers refuses a file that has alpha tensors and a configuration in its header."""
    made = make.diffusers(tmp_path / "a.safetensors", "sd15", network_alpha=2.0, rank=4)
    other = make.diffusers(tmp_path / "b.safetensors", "sd15", seed=1, only=["down_blocks.0"])
    first, second = lt.load(made.path), lt.load(other.path)
    lt.save(lt.merge([first, second]), tmp_path / "m.safetensors")
    new, metadata = make.read_safetensors(tmp_path / "m.safetensors")
    assert "lora_adapter_metadata" in metadata
    assert not [key for key in new if key.endswith("alpha")]
    make.assert_close(make.whole(lt.load(tmp_path / "m.safetensors")), _sum((1.0, 1.0), first, second))


def test_flattened_names_of_an_unknown_architecture_are_not_written_with_dots(tmp_path: Path) -> None:
    stem = "lora_unet_blocks_0_cross_thing_q"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}
    make.write_safetensors(tmp_path / "a.safetensors", tensors, None)
    adapter = lt.load(tmp_path / "a.safetensors")
    assert adapter.arch == "unknown"
    for layout, output in (("diffusers", "m.safetensors"), ("peft", "m")):
        with pytest.raises(LayoutError, match="--arch"):
            lt.save(lt.merge([adapter], weights=[0.5], layout=layout), tmp_path / output)
    lt.save(lt.merge([adapter], weights=[0.5]), tmp_path / "kohya.safetensors")
    assert list(lt.load(tmp_path / "kohya.safetensors").modules) == list(adapter.modules)


def test_one_weight_in_two_spellings_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    kohya, dotted = "lora_unet_blocks_0_cross_thing_q", "diffusion_model.blocks.0.cross_thing.q"
    for name, stem in (("a", kohya), ("b", dotted)):
        tensors = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}
        make.write_safetensors(tmp_path / f"{name}.safetensors", tensors, None)
    adapters = [lt.load(tmp_path / f"{name}.safetensors") for name in "ab"]
    with pytest.raises(NameResolutionError, match="underscores"):
        lt.merge(adapters)


def test_two_adapters_of_one_speech_model_are_of_one_architecture(tmp_path: Path) -> None:
    """Whisper's projections alone look like a language model's; its convolutions do not."""
    one = make.peft(tmp_path / "a", (("model.decoder.layers.0.self_attn.q_proj", (16, 16)),))
    two = make.peft(
        tmp_path / "b",
        (("model.decoder.layers.0.encoder_attn.q_proj", (16, 16)),),
        seed=1,
        config={"base_model_name_or_path": "openai/whisper-base"},
    )
    adapters = [lt.load(one.path), lt.load(two.path)]
    assert [adapter.arch for adapter in adapters] == ["llm", "speech"]
    merged = lt.merge(adapters)
    assert merged.arch == "speech"
    assert {target.component for target in merged.modules} == {"speech_model"}
    assert len(merged.modules) == 2


@pytest.mark.parametrize("layout", ["comfy", "onetrainer", "lycoris"])
def test_components_that_a_layout_spells_in_a_dialect_of_its_own_are_merged_into_it(
    layout: str, tmp_path: Path
) -> None:
    """ComfyUI has the parts of OpenCLIP's in_proj, though it has the checkpoint's names of the UNet."""
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    adapter = lt.load(made.path)
    lt.save(lt.merge([adapter, adapter], weights=[0.5, 0.5], layout=layout), tmp_path / "m.safetensors")
    make.assert_close(make.whole(lt.load(tmp_path / "m.safetensors")), make.whole(adapter))
