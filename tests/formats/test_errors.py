"""What cannot be an adapter is refused with its reason; what is merely unknown is read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools import formats
from loratools.errors import (
    ArchitectureError,
    IncompleteModuleError,
    LayoutError,
    LoraError,
    MalformedFileError,
    MissingFileError,
    NameResolutionError,
    NotAnAdapterError,
    OptionError,
    OutputExistsError,
    ShapeError,
)

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def write(path: Path, **tensors: torch.Tensor) -> Path:
    make.write_safetensors(path, {name.replace("__", "."): tensor for name, tensor in tensors.items()}, None)
    return path


def keys(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    make.write_safetensors(path, tensors, None)
    return path


@pytest.mark.parametrize(("there", "lacks"), [("up", "down"), ("down", "up")])
def test_half_a_pair_is_named(there: str, lacks: str, tmp_path: Path) -> None:
    path = keys(tmp_path / "a.safetensors", {f"{STEM}.lora_{there}.weight": torch.ones(4, 4)})
    with pytest.raises(IncompleteModuleError, match=f"no {lacks} factor") as caught:
        lt.load(path)
    assert STEM in str(caught.value)
    assert caught.value.keys == (f"{STEM}.lora_{there}.weight",)


def test_ranks_that_disagree_are_shown(tmp_path: Path) -> None:
    path = keys(
        tmp_path / "a.safetensors",
        {f"{STEM}.lora_up.weight": torch.ones(8, 4), f"{STEM}.lora_down.weight": torch.ones(3, 8)},
    )
    with pytest.raises(ShapeError, match=r"\[8, 4\].*\[3, 8\]"):
        lt.load(path)


def test_a_mid_that_does_not_fit_is_shown(tmp_path: Path) -> None:
    path = keys(
        tmp_path / "a.safetensors",
        {
            f"{STEM}.lora_up.weight": torch.ones(8, 4, 1, 1),
            f"{STEM}.lora_down.weight": torch.ones(4, 8, 1, 1),
            f"{STEM}.lora_mid.weight": torch.ones(4, 5, 3, 3),
        },
    )
    with pytest.raises(ShapeError, match=r"mid is \[4, 5, 3, 3\]"):
        lt.load(path)


def test_two_adapters_in_one_file_are_named(tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{factor}.{name}.weight": torch.ones(4, 4)
        for factor in "AB"
        for name in ("style", "person")
    }
    with pytest.raises(NotAnAdapterError, match="2 adapters") as caught:
        lt.load(keys(tmp_path / "a.safetensors", tensors))
    assert caught.value.keys == ("person", "style")


def test_two_keys_for_one_weight_are_named(tmp_path: Path) -> None:
    paths = ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", STEM)
    tensors = {
        f"{paths[0]}.lora_A.weight": torch.ones(4, 12),
        f"{paths[0]}.lora_B.weight": torch.ones(12, 4),
        f"{paths[1]}.lora_down.weight": torch.ones(4, 12),
        f"{paths[1]}.lora_up.weight": torch.ones(12, 4),
    }
    with pytest.raises(NameResolutionError, match="two modules name") as caught:
        lt.load(keys(tmp_path / "a.safetensors", tensors), arch="sd15")
    assert set(caught.value.keys) == set(paths)


def test_one_factor_spelt_twice_is_not_swallowed(tmp_path: Path) -> None:
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{stem}.lora_A.weight": torch.ones(4, 12),
        f"{stem}.lora_B.weight": torch.ones(12, 4),
        f"{stem}.lora.down.weight": torch.zeros(4, 12),
        f"{stem}.lora.up.weight": torch.zeros(12, 4),
    }
    with pytest.raises(LoraError) as caught:
        lt.load(keys(tmp_path / "a.safetensors", tensors))
    assert set(caught.value.keys) & set(tensors)


def test_a_magnitude_without_factors_is_named(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", only=["attn1_to_q"])
    made.tensors["lora_unet_mid_block_attentions_0_proj_in.dora_scale"] = torch.ones(4, 1)
    with pytest.raises(IncompleteModuleError, match="magnitude"):
        lt.load(keys(made.path, made.tensors))


def test_an_alpha_without_factors_is_said_and_kept(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", only=["attn1_to_q"])
    made.tensors["lora_unet_conv_in.alpha"] = torch.tensor(1.0)
    make.write_safetensors(made.path, made.tensors, None)
    adapter = lt.load(made.path)
    assert list(adapter.extras) == ["lora_unet_conv_in.alpha"]
    assert any("lora_unet_conv_in" in note for note in adapter.notes)
    make.assert_round_trip(made, tmp_path / "b.safetensors")


@pytest.mark.parametrize("text", ["{", "[1, 2]", "null", "\x00"])
def test_a_configuration_that_is_no_object_is_named(text: str, tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a")
    (made.path / "adapter_config.json").write_text(text, "utf-8")
    with pytest.raises(MalformedFileError, match=r"adapter_config\.json"):
        lt.load(made.path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha_pattern", []),
        ("rank_pattern", "q_proj"),
        ("alpha_pattern", {"(": 1}),
        ("lora_alpha", "8"),
        ("r", None),
    ],
)
def test_odd_fields_in_the_configuration_raise_nothing_but_lora_errors(
    field: str, value: object, tmp_path: Path
) -> None:
    made = make.peft(tmp_path / "a")
    config = json.loads((made.path / "adapter_config.json").read_text())
    config[field] = value
    (made.path / "adapter_config.json").write_text(json.dumps(config))
    with contextlib.suppress(LoraError):
        assert len(lt.load(made.path).modules) == len(make.LLAMA)


def test_an_unknown_architecture_is_read_merged_and_written(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", make.STRANGE, component="model")
    adapter = lt.load(made.path)
    assert adapter.arch == "unknown"
    make.assert_close(make.deltas_of(adapter), made.deltas)
    merged = lt.merge([adapter, adapter], weights=[0.5, 0.5])
    lt.save(merged, tmp_path / "b")
    make.assert_close(make.deltas_of(lt.load(tmp_path / "b")), made.deltas)


def test_an_unknown_architecture_name_offers_near_misses(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors")
    with pytest.raises(ArchitectureError, match="sdxl"):
        lt.load(made.path, arch="sdxll")


def test_the_architecture_may_be_given(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", only=["attn1"])
    assert lt.load(made.path, arch="sd2").arch == "sd2"


def test_names_that_fit_two_architectures_say_so(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", only=["attn1_to_q"])
    adapter = lt.load(made.path)
    assert adapter.arch == "unknown"
    assert any("sd15" in note and "sd2" in note for note in adapter.notes)
    make.assert_round_trip(made, tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", ["nothing.safetensors", "nothing"])
def test_a_missing_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as caught:
        lt.load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["nothing.safetensors", "nowhere/nothing.safetensors"])
def test_a_missing_file_is_told_in_four_parts(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file") as caught:
        lt.io.open_tensors(tmp_path / name)
    error = caught.value
    assert (error.path, error.expected) == (str(tmp_path / name), "A file of tensors was expected")
    assert error.todo


def test_an_empty_folder_and_a_crowded_one(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no adapter"):
        lt.load(tmp_path)
    made = make.kohya(tmp_path / "one.safetensors")
    assert len(lt.load(tmp_path).modules) == len(made.deltas)
    make.kohya(tmp_path / "two.safetensors")
    with pytest.raises(MissingFileError, match="2 weight files"):
        lt.load(tmp_path)


def test_an_unknown_layout_offers_near_misses(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors")
    with pytest.raises(LayoutError, match="Did you mean: kohya"):
        lt.save(lt.load(made.path), tmp_path / "b.safetensors", layout="kohyaa")


def _with_one_that_is_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**formats.scan("loratools.formats", "FORMAT")}
    known["bygone"] = formats.Format(name="bygone", title="Bygone", claims=lambda _: 0.0)
    monkeypatch.setattr(formats, "scan", lambda package, constant: known)


def test_a_layout_that_is_only_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make.kohya(tmp_path / "a.safetensors")
    _with_one_that_is_only_read(monkeypatch)
    with pytest.raises(LayoutError, match="read but not written"):
        lt.save(lt.load(made.path), tmp_path / "b.safetensors", layout="bygone")
    assert not (tmp_path / "b.safetensors").exists()


def test_extras_cannot_go_into_another_layout_unless_dropped(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", extra={"strange": torch.ones(1)})
    adapter = lt.load(made.path)
    with pytest.raises(LayoutError, match="strange"):
        lt.save(adapter, tmp_path / "b.safetensors", layout="diffusers")
    lt.save(adapter, tmp_path / "b.safetensors", layout="diffusers", drop=["extras"])
    assert not lt.load(tmp_path / "b.safetensors").extras


def test_only_extras_can_be_dropped(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match="modules"):
        lt.save(lt.load(made.path), tmp_path / "b.safetensors", drop=["modules"])


def test_an_existing_output_is_refused_and_left(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputExistsError):
        lt.save(lt.load(made.path), tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == b"mine"
    lt.save(lt.load(made.path), tmp_path / "b.safetensors", overwrite=True)
    assert len(lt.load(tmp_path / "b.safetensors").modules) == len(made.deltas)


def test_a_file_may_be_written_over_itself(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors")
    lt.save(lt.load(made.path), made.path, dtype="float16", overwrite=True)
    adapter = lt.load(made.path)
    assert {ref.dtype for m in adapter.modules.values() for ref in m.factors.values()} == {"F16"}
    make.assert_close(make.deltas_of(adapter), made.deltas, 2e-3)


def test_peft_wants_a_folder_and_the_others_a_safetensors_file(tmp_path: Path) -> None:
    kohya, peft = make.kohya(tmp_path / "a.safetensors"), make.peft(tmp_path / "a")
    with pytest.raises(OptionError, match="the PEFT layout is a folder") as caught:
        lt.save(lt.load(peft.path), tmp_path / "b.safetensors")
    assert caught.value.expected == "A name was expected that does not end in .safetensors"
    assert caught.value.todo
    with pytest.raises(LayoutError, match=r"\.ckpt"):
        lt.save(lt.load(kohya.path), tmp_path / "b.ckpt")


def test_peft_holds_one_component(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", only=["attn", "te_"])
    with pytest.raises(LayoutError, match="more than one component") as caught:
        lt.save(lt.load(made.path), tmp_path / "b", layout="peft")
    assert set(caught.value.keys) == {key for key in made.tensors if key.startswith("lora_te_")}
    assert not (tmp_path / "b").exists()
    encoder = make.kohya(tmp_path / "c.safetensors", "sd15", only=["te_"])
    lt.save(lt.load(encoder.path, arch="sd15"), tmp_path / "c", layout="peft")
    assert len(lt.load(tmp_path / "c", arch="sd15").modules) == len(encoder.deltas)


def test_a_text_encoder_that_peft_could_not_tell_from_another_is_refused(tmp_path: Path) -> None:
    """Both of Stable Diffusion XL's have the same names, which are read as the first one's."""
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", alpha=4.0, only=["te2_"])
    with pytest.raises(LayoutError, match=r"text_encoder_2 of Stable Diffusion XL.*can hold them") as caught:
        lt.save(lt.load(made.path, arch="sdxl"), tmp_path / "b", layout="peft")
    assert set(caught.value.keys) == made.tensors.keys()


def test_a_component_inside_another_is_under_its_own_prefix_in_peft(tmp_path: Path) -> None:
    """Anima's conditioner is a part of its transformer, and both have a block of the same name."""
    tensors = {
        f"lora_unet_{path}.lora_{role}.weight": torch.full(shape, float(value))
        for value, path in enumerate(
            ("blocks_0_cross_attn_q_proj", "llm_adapter_blocks_0_cross_attn_q_proj"), 1
        )
        for role, shape in (("up", (8, 2)), ("down", (2, 8)))
    }
    make.write_safetensors(tmp_path / "a.safetensors", tensors, None)
    adapter = lt.load(tmp_path / "a.safetensors", arch="anima")
    assert set(adapter.components()) == {"denoiser", "text_conditioner"}
    lt.save(adapter, tmp_path / "b", layout="peft")
    again = lt.load(tmp_path / "b", arch="anima")
    make.assert_close(make.deltas_of(again), make.deltas_of(adapter))
    assert again.config["target_modules"] == [
        "llm_adapter.blocks.0.cross_attn.q_proj",
        "transformer_blocks.0.attn2.to_q",
    ]


def test_a_kind_that_a_layout_has_no_place_for_is_named(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", kind="loha", only=["attn2"])
    with pytest.raises(LayoutError, match="hada_w1_a"):
        lt.save(lt.load(made.path), tmp_path / "b.safetensors", layout="diffusers")


def test_a_tucker_form_cannot_be_spelt_in_diffusers(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", mid=True)
    with pytest.raises(LayoutError, match="mid"):
        lt.save(lt.load(made.path), tmp_path / "b.safetensors", layout="diffusers")


def test_an_architecture_that_explains_no_name_is_refused(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", only=["lora_unet_"])
    with pytest.raises(ArchitectureError, match=r"Flux.*--arch"):
        lt.load(made.path, arch="flux")
    assert not lt.load(made.path, arch="sd15").notes
    # Both have the same text encoder: what is left over is said.
    whole = make.kohya(tmp_path / "b.safetensors", "sd15")
    assert any("not those of flux" in note for note in lt.load(whole.path, arch="flux").notes)


def test_too_little_memory_is_not_called_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "a.pt")

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError):
        lt.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("a1111", ("kohya",)),
        ("webui", ("kohya",)),
        ("Forge", ("kohya",)),
        ("automatic1111", ("kohya",)),
        ("ComfyUI", ("comfy",)),
        ("hf", ("diffusers", "peft")),
        ("huggingface", ("diffusers", "peft")),
    ],
)
def test_a_program_s_name_offers_the_layouts_that_it_reads(name: str, meant: tuple[str, ...]) -> None:
    with pytest.raises(LayoutError) as caught:
        formats.get(name)
    assert caught.value.candidates == meant
    assert set(meant) <= set(formats.writable())


def test_the_layouts_that_are_only_read_are_told_from_those_that_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _with_one_that_is_only_read(monkeypatch)
    with pytest.raises(LayoutError) as caught:
        formats.get("nothing like it")
    written, _, only_read = caught.value.expected.partition("for reading alone")
    assert all(name in written for name in formats.writable())
    assert "bygone" in only_read.replace(",", "").split()
    assert "bygone" not in written


def test_an_alpha_of_several_numbers_is_named_with_its_file(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors")
    key = next(key for key in made.tensors if key.endswith(".alpha"))
    make.write_safetensors(made.path, made.tensors | {key: torch.ones(2)}, None)
    with pytest.raises(MalformedFileError) as caught:
        lt.load(made.path)
    error = caught.value
    assert (error.path, error.keys) == (str(made.path), (key,))
    assert "[2]" in error.problem
    assert "single number" in error.expected
    assert error.todo
