"""``--base``: names taken from the base checkpoint, there and back, with the proof that nothing else changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools.errors import LayoutError, NameResolutionError, ShapeError
from loratools.ops.convert import convert, convert_file

Model = tuple[tuple[str, tuple[int, ...]], ...]
# A language model, one whose weights are stored the other way round, a private one, and one that flattens badly.
MODELS: Mapping[str, Model] = {
    "llama": make.LLAMA,
    "gpt2": make.GPT2,
    "private": (*make.STRANGE, ("tower.0.in_proj", (6, 4)), ("tower.10.to_out.0", (4, 6))),
    "underscores": (("a_b.c_d.0.e_f", (4, 6)), ("a.b_c.1.e.f", (6, 4)), ("x_0.y", (4, 4))),
}


def weights(model: Model, *, prefix: str = "", in_first: bool = False) -> dict[str, torch.Tensor]:
    """A base's tensors by key."""
    return {
        f"{prefix}{path}.weight": torch.zeros(shape[::-1] if in_first else shape) for path, shape in model
    }


def single(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    make.write_safetensors(folder / "base.safetensors", dict(tensors), None)
    return folder / "base.safetensors"


def sharded(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A folder of two shards and their index."""
    shards = {key: f"model-{number % 2}.safetensors" for number, key in enumerate(tensors)}
    for name in set(shards.values()):
        held = {key: tensor for key, tensor in tensors.items() if shards[key] == name}
        make.write_safetensors(folder / "base" / name, held, None)
    index = json.dumps({"metadata": {}, "weight_map": shards})
    (folder / "base" / "model.safetensors.index.json").write_text(index)
    return folder / "base"


def pipeline(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A diffusers folder with one network."""
    make.write_safetensors(
        folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors", dict(tensors), None
    )
    (folder / "model" / "model_index.json").write_text("{}")
    return folder / "model"


def flattened(
    path: Path, model: Model, *, prefix: str = "lora_unet_", extra: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """A file with Kohya-style names of a model that no table describes."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, (out, into)) in enumerate(model):
        stem, rank = prefix + name.replace(".", "_"), 1 + number % 3
        tensors[f"{stem}.alpha"] = torch.tensor(float(rank) * 2 ** (number % 2))
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, into, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, rank, generator=generator)
    make.write_safetensors(path, {**tensors, **(extra or {})}, None)
    return path


def deltas(path: Path, arch: str | None = None) -> dict[str, torch.Tensor]:
    return {target.path: module.delta() for target, module in lt.load(path, arch=arch).modules.items()}


def keys(path: Path) -> set[str]:
    return set(make.read_safetensors(path)[0])


def same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.allclose(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("held", [single, sharded], ids=["file", "shards"])
@pytest.mark.parametrize("name", MODELS)
def test_flattened_names_become_a_peft_folder(
    name: str, held: Callable[[Path, Mapping[str, torch.Tensor]], Path], tmp_path: Path
) -> None:
    model = MODELS[name]
    base = held(tmp_path, weights(model, in_first=name == "gpt2"))
    file = flattened(tmp_path / "in.safetensors", model)
    report = convert_file(file, tmp_path / "out", to="peft", base=base)
    assert keys(tmp_path / "out" / "adapter_model.safetensors") == {
        f"base_model.model.{path}.lora_{factor}.weight" for path, _ in model for factor in "AB"
    }
    before = deltas(file)
    assert same(deltas(tmp_path / "out"), {path: before[path.replace(".", "_")] for path, _ in model})
    assert (report.weights, report.error) == (len(model), 0.0)
    assert any(f"{len(model)} modules took the base's names" in note for note in report.notes)
    # Every tensor of the input is accounted for under the key that it had.
    assert {entry.key for entry in report.ledger} == keys(file)
    fates = {entry.key: entry.fate for entry in report.ledger}
    assert {fate for key, fate in fates.items() if not key.endswith(".alpha")} == {"moved"}
    # An alpha equal to the rank says nothing; the others are in the configuration.
    assert {fate for key, fate in fates.items() if key.endswith(".alpha")} == {"metadata"}


@pytest.mark.parametrize("dotted", ["comfy", "loralib"])
@pytest.mark.parametrize("name", ["private", "underscores"])
def test_flattened_names_come_back_as_they_were(name: str, dotted: str, tmp_path: Path) -> None:
    model = MODELS[name]
    base = single(tmp_path, weights(model))
    file = flattened(tmp_path / "in.safetensors", model)
    there = tmp_path / "there.safetensors"
    convert_file(file, there, to=dotted, base=base)
    assert {path for path, _ in model} == set(deltas(there, "unknown"))
    if dotted == "comfy":
        convert_file(there, tmp_path / "back.safetensors", to="kohya")
        assert make.read_safetensors(tmp_path / "back.safetensors")[0] == make.read_safetensors(file)[0]


def test_without_a_base_flattened_names_stay_flattened_and_are_refused_where_dots_are_needed(
    tmp_path: Path,
) -> None:
    file = flattened(tmp_path / "in.safetensors", make.LLAMA)
    with pytest.raises(LayoutError, match="dots a flattened layout has replaced") as caught:
        convert_file(file, tmp_path / "out", to="peft")
    assert set(caught.value.keys) == keys(file)
    assert not (tmp_path / "out").exists()
    convert_file(file, tmp_path / "again.safetensors", to="kohya")
    assert make.read_safetensors(tmp_path / "again.safetensors")[0] == make.read_safetensors(file)[0]


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("model.", "model.language_model."),
        ("model.language_model.", "model."),
        ("model.", "language_model.model."),
        ("model.", ""),
        ("", "model."),
        ("base_model.model.model.", "model."),
        ("_orig_mod.model.", "model."),
    ],
)
def test_wrappers_of_a_peft_adapter_are_those_of_the_base(mine: str, theirs: str, tmp_path: Path) -> None:
    body = [(path.removeprefix("model."), shape) for path, shape in make.LLAMA]
    made = make.peft(tmp_path / "in", tuple((mine + path, shape) for path, shape in body))
    base = single(tmp_path, weights(tuple((theirs + path, shape) for path, shape in body)))
    report = convert_file(made.path, tmp_path / "out", to="peft", base=base)
    assert {target.path for target in lt.load(tmp_path / "out").modules} == {
        theirs + path for path, _ in body
    }
    assert report.error == 0.0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    named = config["target_modules"]
    assert all(any((theirs + path).endswith(each) for each in named) for path, _ in body)
    before = {path[path.index("layers.") :]: delta for path, delta in deltas(made.path).items()}
    assert same(deltas(tmp_path / "out"), {theirs + path: before[path] for path, _ in body})


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("arch", ["sd15", "sdxl", "flux"])
def test_names_of_a_table_are_written_as_without_a_base(arch: str, layout: str, tmp_path: Path) -> None:
    """The base is looked up, in its own names or in diffusers'; a table's names are not changed by it."""
    file = make.kohya(tmp_path / "in.safetensors", arch).path
    networks: dict[str, dict[str, torch.Tensor]] = {}
    for weight in make.DIFFUSERS_WEIGHTS[arch]:
        network, _, path = weight.diffusers.partition(".")
        networks.setdefault(network, {})[f"{path}.weight"] = torch.zeros(weight.shape)
    for network, held in networks.items():
        stem = "model" if network.startswith("text") else "diffusion_pytorch_model"
        make.write_safetensors(tmp_path / "model" / network / f"{stem}.safetensors", held, None)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    report = convert_file(file, tmp_path / "with.safetensors", to=layout, base=tmp_path / "model")
    convert_file(file, tmp_path / "without.safetensors", to=layout)
    assert (tmp_path / "with.safetensors").read_bytes() == (tmp_path / "without.safetensors").read_bytes()
    assert not any("base's names" in note for note in report.notes)
    first = "transformer" if arch == "flux" else "unet"
    _, *others = networks[first]
    short = {key: networks[first][key] for key in others}
    make.write_safetensors(tmp_path / "model" / first / "diffusion_pytorch_model.safetensors", short, None)
    with pytest.raises(NameResolutionError, match=r"1 of \d+ modules are not in"):
        convert_file(file, tmp_path / "lacking.safetensors", to=layout, base=tmp_path / "model")
    assert not (tmp_path / "lacking.safetensors").exists()


def test_an_unknown_network_of_a_pipeline_gives_its_names(tmp_path: Path) -> None:
    model = MODELS["private"]
    base = pipeline(tmp_path, weights(model))
    file = flattened(tmp_path / "in.safetensors", model)
    convert_file(file, tmp_path / "out.safetensors", to="diffusers", base=base)
    assert keys(tmp_path / "out.safetensors") == {
        f"transformer.{path}.lora_{factor}.weight" for path, _ in model for factor in "AB"
    }


def test_names_that_turn_out_to_be_a_language_model_s_are_proved_too(tmp_path: Path) -> None:
    base = single(tmp_path, weights(make.LLAMA))
    file = flattened(tmp_path / "in.safetensors", make.LLAMA)
    report = convert_file(file, tmp_path / "out.safetensors", to="diffusers", base=base)
    assert (report.weights, report.error) == (len(make.LLAMA), 0.0)


def refused(
    error: type[Exception], match: str, adapter: Model, base: Iterable[tuple[str, tuple[int, ...]]], at: Path
) -> Exception:
    """The error of a conversion to PEFT, which leaves nothing behind."""
    file = flattened(at / "in.safetensors", adapter)
    held = single(at, weights(tuple(base)))
    with pytest.raises(error, match=match) as caught:
        convert_file(file, at / "out", to="peft", base=held)
    assert not (at / "out").exists()
    return caught.value


def test_a_base_of_another_model_is_refused_with_names_of_both(tmp_path: Path) -> None:
    error = refused(NameResolutionError, "none of the 5 modules is in", make.LLAMA, make.STRANGE, tmp_path)
    assert "model_layers_0_self_attn_q_proj" in str(error)
    assert "tower.stage_a.gate" in str(error)


def test_a_module_that_the_base_lacks_is_named_with_its_likes(tmp_path: Path) -> None:
    path, shape = make.LLAMA[1]
    renamed = [(path.replace("v_proj", "v_prj"), shape), *make.LLAMA[:1], *make.LLAMA[2:]]
    error = refused(NameResolutionError, "1 of 5 modules are not in", make.LLAMA, renamed, tmp_path)
    assert isinstance(error, NameResolutionError)
    assert error.keys == (path.replace(".", "_"),)
    assert error.candidates[0] == "model.layers.0.self_attn.v_prj"


def test_a_name_of_two_modules_is_refused_with_both(tmp_path: Path) -> None:
    alike = [("blocks.0.to_q", (4, 4)), ("blocks.0.to.q", (4, 4))]
    error = refused(
        NameResolutionError, r"may be blocks\.0\.to_q or blocks\.0\.to\.q", tuple(alike[:1]), alike, tmp_path
    )
    assert isinstance(error, NameResolutionError)
    assert error.keys == ("blocks_0_to_q",)


def test_shapes_decide_where_names_do_not(tmp_path: Path) -> None:
    model = (("blocks.0.to.q", (8, 4)),)
    base = single(tmp_path, weights((("blocks.0.to_q", (4, 4)), *model)))
    convert_file(flattened(tmp_path / "in.safetensors", model), tmp_path / "out", to="peft", base=base)
    assert set(deltas(tmp_path / "out")) == {"blocks.0.to.q"}


def test_another_shape_is_refused_with_both(tmp_path: Path) -> None:
    narrow = [(path, (shape[0], shape[1] + 1)) for path, shape in make.LLAMA]
    error = refused(ShapeError, r"5 of 5 modules do not fit", make.LLAMA, narrow, tmp_path)
    assert "[16, 16]" in str(error)
    assert "[16, 17]" in str(error)


@pytest.mark.parametrize(("have", "want"), [("qkv_proj", "q_proj"), ("gate_proj", "gate_up_proj")])
def test_a_fused_weight_is_not_taken_for_its_part(have: str, want: str, tmp_path: Path) -> None:
    path = "model.layers.0.self_attn."
    refused(NameResolutionError, "fused", ((path + want, (4, 4)),), [(path + have, (4, 4))], tmp_path)


def test_tensors_of_no_module_keep_their_names_and_a_note_says_so(tmp_path: Path) -> None:
    head = torch.arange(12.0).reshape(3, 4)
    made = make.peft(
        tmp_path / "in",
        extra={"base_model.model.lm_head.weight": head},
        config={"modules_to_save": ["lm_head"]},
    )
    wrapped = tuple((path.replace("model.", "model.text."), shape) for path, shape in make.LLAMA)
    base = single(tmp_path, weights((*wrapped, ("lm_head", (3, 4)))))
    report = convert_file(made.path, tmp_path / "out", to="peft", base=base)
    out = make.read_safetensors(tmp_path / "out" / "adapter_model.safetensors")[0]
    assert out["base_model.model.lm_head.weight"][2] == head.numpy().tobytes()
    assert any("1 tensors that belong to no module keep the names" in note for note in report.notes)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == [
        "lm_head"
    ]
    fates = {entry.key: entry.fate for entry in report.ledger}
    assert fates["base_model.model.lm_head.weight"] == "moved"


def test_embedded_tokens_of_a_flattened_file_are_refused_by_name_and_dropped(tmp_path: Path) -> None:
    token = {"bundle_emb.style.string_to_param.*": torch.ones(2, 4)}
    file = flattened(tmp_path / "in.safetensors", MODELS["private"], extra=token)
    base = single(tmp_path, weights(MODELS["private"]))
    with pytest.raises(LayoutError, match="--drop extras") as caught:
        convert_file(file, tmp_path / "out", to="peft", base=base)
    assert caught.value.keys == tuple(token)
    report = convert_file(file, tmp_path / "out", to="peft", base=base, drop=["extras"])
    assert {entry.key for entry in report.ledger if entry.fate == "dropped"} == set(token)


def test_a_component_that_the_base_lacks_keeps_its_names(tmp_path: Path) -> None:
    file = make.kohya(tmp_path / "in.safetensors", "sd15").path
    held = {
        f"{weight.target}.weight": torch.zeros(weight.shape)
        for weight in make.SD15
        if weight.component == "denoiser"
    }
    report = convert_file(file, tmp_path / "out.safetensors", to="diffusers", base=single(tmp_path, held))
    assert any("no text_encoder" in note for note in report.notes)
    make.assert_close(make.deltas_of(lt.load(tmp_path / "out.safetensors")), make.deltas_of(lt.load(file)))


@pytest.mark.parametrize("in_first", [False, True])
def test_a_dtype_is_cast_and_proved_under_the_base_s_names(in_first: bool, tmp_path: Path) -> None:
    base = single(tmp_path, weights(make.GPT2, in_first=in_first))
    file = flattened(tmp_path / "in.safetensors", make.GPT2)
    report = convert_file(file, tmp_path / "out", to="peft", base=base, dtype="bfloat16")
    assert report.dtypes == {"BF16": 2 * len(make.GPT2)}
    assert report.weights == len(make.GPT2)
    assert report.error is not None
    assert 0.0 < report.error < 3e-2


def test_the_ledger_s_keys_lead_from_the_file_s_names_to_the_base_s(tmp_path: Path) -> None:
    base = single(tmp_path, weights(make.STRANGE))
    adapter = lt.load(flattened(tmp_path / "in.safetensors", make.STRANGE))
    found = convert(adapter, "peft", base=base)
    moved = {entry.key: entry.into for entry in found.ledger if entry.fate == "moved"}
    assert moved == {
        f"lora_unet_{path.replace('.', '_')}.lora_{mine}.weight": (
            f"base_model.model.{path}.lora_{theirs}.weight",
        )
        for path, _ in make.STRANGE
        for mine, theirs in (("down", "A"), ("up", "B"))
    }


@pytest.mark.peers
def test_peft_loads_what_became_of_flattened_names(tmp_path: Path) -> None:
    """The converted folder on a tiny Llama: every module is adapted, and the merged weights moved by ΔW."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    file = flattened(tmp_path / "in.safetensors", make.LLAMA)
    convert_file(file, tmp_path / "out", to="peft", base=tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    expected = deltas(file)
    for name, weight in merged.items():
        path = name.removesuffix(".weight").replace(".", "_")
        moved = expected.get(path, torch.zeros_like(weight))
        assert torch.allclose(weight - before[name], moved, atol=1e-5), name
    assert {path.replace(".", "_") for path, _ in make.LLAMA} == set(expected)
