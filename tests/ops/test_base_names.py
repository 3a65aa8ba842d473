"""Adapters' names against those of a base: wrappers, flattened names, tables, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools import archs, formats
from loratools.errors import NameResolutionError, ShapeError
from loratools.io.base import Base, Weight, keys_of
from loratools.model import Adapter, Layout, Module, Target
from loratools.ops._base_match import Move, Paths
from loratools.ops.base_names import against
from loratools.tensors import BytesSource, TensorRef

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "names"
NOTHING = BytesSource(memoryview(b""))
Shape = tuple[int, ...]


def base(shapes: Mapping[str, Shape], *, dtype: str = "BF16", part: str = "") -> Base:
    """A base of which only names and shapes exist: weights of modules, and bare parameters where they say so."""
    weights = {}
    for name, shape in shapes.items():
        key = name if name.endswith(("_weight", "_bias", ".bias", "embedding")) else f"{name}.weight"
        weights[key] = Weight(key, shape, dtype, "base.safetensors")
    return Base("base", {part: weights})


def adapter(
    shapes: Mapping[str, Shape | None], component: str = "language_model", arch: str = "llm", rank: int = 2
) -> Adapter:
    """An adapter of which only names and shapes exist."""
    modules = {}
    for name, shape in shapes.items():
        target = Target(component, name)
        factors = {
            "up": TensorRef(f"{name}.up", ((shape or (4,))[0], rank), "F32", NOTHING),
            "down": TensorRef(f"{name}.down", (rank, *(shape or (4, 4))[1:]), "F32", NOTHING),
        }
        modules[target] = Module(target, "lora", factors, rank=rank, shape=shape, alpha=float(rank))
    return Adapter(modules, arch=arch, layout=Layout("peft"), order=("some key",))


def renamed(before: Adapter, found: Base) -> dict[str, str]:
    """The new path of each old one."""
    after = against(before, found)
    return {old.path: new.path for old, new in zip(before.modules, after.modules, strict=True)}


def stand_in(name: str) -> dict[str, Shape]:
    """The modules of a published model with their shapes, by the names that its checkpoint has."""
    file = SHARED / f"{name}.json"
    if not file.is_file():
        pytest.skip("the shared tables of names are not here")
    modules = json.loads(file.read_text())["components"]["model"]["modules"]
    return {row["native"]: tuple(row.get("stored_shape", row["shape"])) for row in modules}


def without(names: Iterable[str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): name for name in names}


PUBLISHED = ("llama", "qwen2_5_vl", "mixtral", "whisper", "gpt2", "mpt", "gpt_neox", "bert", "t5", "wav2vec2")


@pytest.mark.parametrize("name", PUBLISHED)
def test_flattened_names_of_any_model_are_found(name: str) -> None:
    shapes = stand_in(name)
    flat = {path.replace(".", "_"): shape for path, shape in shapes.items()}
    found = renamed(adapter(flat, "denoiser", "unknown"), base(shapes))
    assert found == {path.replace(".", "_"): path for path in shapes}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("wrapper", ["base_model.model.", "_orig_mod.", "model.language_model.", "network."])
def test_wrappers_come_off_and_go_on(name: str, wrapper: str) -> None:
    shapes = stand_in(name)
    wrapped = {wrapper + path: shape for path, shape in shapes.items()}
    assert renamed(adapter(wrapped), base(shapes)) == {wrapper + path: path for path in shapes}
    assert renamed(adapter(shapes), base(wrapped)) == {path: wrapper + path for path in shapes}
    flat = {path.replace(".", "_"): shape for path, shape in shapes.items()}
    assert renamed(adapter(flat), base(wrapped)) == {
        path.replace(".", "_"): wrapper + path for path in shapes
    }


@pytest.mark.parametrize("name", ["llama", "whisper", "gpt2"])
def test_names_that_are_the_base_s_already_stay_in_the_same_adapter(name: str) -> None:
    shapes = stand_in(name)
    given = adapter(shapes)
    assert against(given, base(shapes)) is given


def test_a_vision_language_model_s_earlier_names_are_found() -> None:
    """Until transformers 4.52 the towers were ``model.layers`` and ``visual``."""
    shapes = stand_in("qwen2_5_vl")
    earlier = {
        path: path.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        for path in shapes
    }
    given = adapter({earlier[path]: shape for path, shape in shapes.items()})
    assert renamed(given, base(shapes)) == {old: path for path, old in earlier.items()}


def test_an_adapter_of_the_text_tower_takes_one_prefix_for_all_its_modules() -> None:
    shapes = stand_in("qwen2_5_vl")
    text = {path: shape for path, shape in shapes.items() if ".language_model." in path}
    expected = without(text, "model.language_model.")
    given = adapter({old: shapes[new] for old, new in expected.items()})
    after = against(given, base(shapes))
    assert [target.path for target in after.modules] == list(expected.values())
    assert after.order == ()
    assert any(f"{len(text)} modules took the base's names" in note for note in after.notes)
    assert {ref.name for module in after.modules.values() for ref in module.factors.values()} == {""}


def test_a_decoder_s_names_are_not_taken_for_an_encoder_s() -> None:
    shapes = stand_in("whisper")
    encoder = {path: shape for path, shape in shapes.items() if path.startswith("model.encoder.")}
    decoder = {
        path: shape
        for path, shape in shapes.items()
        if path.startswith("model.decoder.layers.") and "encoder_attn" not in path
    }
    with pytest.raises(NameResolutionError, match="none of the"):
        against(adapter(decoder), base(encoder))
    expected = without(decoder, "model.")
    assert renamed(adapter({old: shapes[new] for old, new in expected.items()}), base(shapes)) == expected


def test_an_end_without_a_number_is_too_short_to_take_words_from_before_it() -> None:
    for name, component in (("lm_head", "denoiser"), ("encoder.head", "language_model")):
        with pytest.raises(NameResolutionError, match="none of the 1 modules"):
            against(adapter({name: (4, 4)}, component), base({"head": (4, 4)}))
    assert renamed(adapter({"model.head": (4, 4)}), base({"head": (4, 4)})) == {"model.head": "head"}


def test_of_modules_found_one_by_one_the_most_alike_is_taken() -> None:
    given = adapter({"decoder.layers.0.fc": (4, 4), "model.visual.layers.7.fc": (4, 4)})
    held = {"model.decoder.layers.0.fc": (4, 4), "layers.0.fc": (4, 4), "visual.layers.7.fc": (4, 4)}
    assert renamed(given, base(held)) == {
        "decoder.layers.0.fc": "model.decoder.layers.0.fc",
        "model.visual.layers.7.fc": "visual.layers.7.fc",
    }


def test_a_number_in_front_is_a_wrapper_and_one_inside_is_not() -> None:
    given = adapter({"encoder.layer.0.query": (4, 4)})
    inside = {"0.auto_model.encoder.layer.0.query": (4, 4)}
    assert list(renamed(given, base(inside)).values()) == list(inside)
    with pytest.raises(NameResolutionError):
        against(adapter({"query": (4, 4)}), base({"encoder.layer.0.query": (4, 4)}))


def test_one_prefix_for_all_is_preferred_to_one_for_each() -> None:
    tower = {f"a.layers.{number}.q": (4, 4) for number in range(2)}
    other = {f"b.layers.{number}.q": (4, 4) for number in range(3)}
    given = adapter({f"layers.{number}.q": (4, 4) for number in range(3)})
    assert set(renamed(given, base({**tower, **other})).values()) == set(other)


def test_shapes_decide_between_towers_and_nothing_else_does() -> None:
    small = {f"text.layers.{number}.q": (4, 4) for number in range(2)}
    large = {f"vision.layers.{number}.q": (6, 6) for number in range(2)}
    names = {f"layers.{number}.q": (6, 6) for number in range(2)}
    assert set(renamed(adapter(names), base({**small, **large})).values()) == set(large)
    with pytest.raises(NameResolutionError, match=r"may be text\.layers\.0\.q or vision\.layers\.0\.q"):
        against(adapter(dict.fromkeys(names, (4, 4))), base({**small, **dict.fromkeys(large, (4, 4))}))


def test_two_modules_of_the_base_that_flatten_alike_are_both_named() -> None:
    alike = {"blocks.0.to_q": (4, 4), "blocks.0.to.q": (4, 4)}
    with pytest.raises(NameResolutionError, match=r"blocks\.0\.to_q or blocks\.0\.to\.q"):
        against(adapter({"blocks_0_to_q": (4, 4)}, "denoiser", "unknown"), base(alike))
    told = {"blocks.0.to_q": (4, 4), "blocks.0.to.q": (8, 4)}
    given = adapter({"blocks_0_to_q": (8, 4)}, "denoiser", "unknown")
    assert renamed(given, base(told)) == {"blocks_0_to_q": "blocks.0.to.q"}


def test_two_names_of_one_module_are_refused() -> None:
    given = adapter({"layers.0.q": (4, 4), "model.layers.0.q": (4, 4)})
    with pytest.raises(NameResolutionError, match=r"are one module of base: net\.layers\.0\.q") as caught:
        against(given, base({"net.layers.0.q": (4, 4)}))
    assert set(caught.value.keys) == {"layers.0.q", "model.layers.0.q"}


def test_missing_modules_are_named_with_near_misses() -> None:
    shapes = stand_in("llama")
    given = adapter({**shapes, "model.layers.3.self_attn.q_prj": (4, 4)})
    with pytest.raises(NameResolutionError, match="1 of 227 modules are not in base") as caught:
        against(given, base(shapes))
    assert caught.value.keys == ("model.layers.3.self_attn.q_prj",)
    assert caught.value.candidates[0] == "model.layers.3.self_attn.q_proj"


def test_a_block_beyond_the_base_s_last_is_missing_and_not_found_elsewhere() -> None:
    shapes = {
        f"model.{side}.layers.{number}.fc": (4, 4) for side in ("encoder", "decoder") for number in (0, 1)
    }
    shapes["model.encoder.layers.2.fc"] = (4, 4)
    given = adapter({"decoder.layers.0.fc": (4, 4), "decoder.layers.2.fc": (4, 4)})
    with pytest.raises(NameResolutionError) as caught:
        against(given, base(shapes))
    assert caught.value.keys == ("decoder.layers.2.fc",)


def test_no_match_at_all_shows_both_sides() -> None:
    given = adapter({"tower.stage_a.gate": (4, 4)}, "model", "unknown")
    with pytest.raises(NameResolutionError, match="none of the 1 modules") as caught:
        against(given, base({"model.layers.0.self_attn.q_proj": (4, 4)}))
    assert "tower.stage_a.gate" in str(caught.value)
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("have", "want"), [("qkv_proj", "q_proj"), ("q_proj", "qkv_proj"), ("up_proj", "gate_up_proj")]
)
@pytest.mark.parametrize("others", [{}, {"model.layers.0.mlp.down_proj": (4, 4)}])
def test_fused_weights_are_not_taken_for_their_parts(have: str, want: str, others: dict[str, Shape]) -> None:
    path = "model.layers.0.self_attn."
    given = adapter({path + want: (4, 4), **others})
    with pytest.raises(NameResolutionError, match="fused") as caught:
        against(given, base({path + have: (4, 4), **others}))
    assert path + have in str(caught.value)


def test_shapes_that_disagree_are_both_named() -> None:
    with pytest.raises(ShapeError, match=r"\[4, 6\].*\[4, 4\]"):
        against(adapter({"layers.0.q": (4, 6)}), base({"model.layers.0.q": (4, 4)}))


@pytest.mark.parametrize(
    ("mine", "stored"),
    [((4, 6), (4, 6)), ((4, 6), (6, 4)), ((4, 6), (4, 6, 1, 1)), ((4, 18), (4, 2, 3, 3)), (None, (4, 6))],
    ids=["same", "in-first", "kernel-of-one", "flattened", "unknown"],
)
def test_shapes_that_mean_the_same_fit(mine: Shape | None, stored: Shape) -> None:
    assert renamed(adapter({"layers.0.q": mine}), base({"layers.0.q": stored})) == {
        "layers.0.q": "layers.0.q"
    }


def test_a_quantised_weight_has_no_shape_to_compare() -> None:
    packed = {"model.layers.0.q": (128, 1)}
    assert renamed(adapter({"layers.0.q": (16, 16)}), base(packed, dtype="U8")) == {
        "layers.0.q": "model.layers.0.q"
    }


def test_wrapped_parameters_of_experts_follow_their_owner() -> None:
    held = Base("base", {"": {"model.mlp.experts.up": Weight("model.mlp.experts.up", (2, 4, 4), "F32", "f")}})
    given = adapter({"mlp.experts": None, "mlp.experts.base_layer": None})
    assert renamed(given, held) == {
        "mlp.experts": "model.mlp.experts",
        "mlp.experts.base_layer": "model.mlp.experts.base_layer",
    }


def test_what_names_the_whole_model_is_left_alone(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", kind="vera")
    given = lt.load(made.path)
    after = against(given, base(dict(make.LLAMA)))
    assert list(after.modules) == list(given.modules)


def test_the_renamed_adapter_is_written_under_the_base_s_names(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", ranks={"model.layers.0.mlp.down_proj": 2})
    shapes = {f"model.language_model.{path.removeprefix('model.')}": shape for path, shape in make.LLAMA}
    after = against(lt.load(made.path), base(shapes))
    lt.save(after, tmp_path / "b")
    again = lt.load(tmp_path / "b")
    assert {target.path for target in again.modules} == set(shapes)
    old = "language_model/model.language_model."
    make.assert_close(
        {key.replace(old, "language_model/model."): d for key, d in make.deltas_of(again).items()},
        made.deltas,
    )


def test_a_flattened_language_model_becomes_a_peft_folder(tmp_path: Path) -> None:
    tensors = {}
    for path, (out, into) in make.LLAMA:
        stem = "lora_unet_" + path.replace(".", "_")
        tensors |= {
            f"{stem}.lora_up.weight": torch.ones(out, 2),
            f"{stem}.lora_down.weight": torch.ones(2, into),
        }
    make.write_safetensors(tmp_path / "k.safetensors", tensors, None)
    after = against(lt.load(tmp_path / "k.safetensors"), base(dict(make.LLAMA)))
    assert [target.component for target in after.modules] == ["denoiser"] * len(make.LLAMA)
    document = formats.document(after, Layout("peft"), formats.get("peft"))
    expected = {f"base_model.model.{path}.lora_{role}.weight" for path, _ in make.LLAMA for role in "AB"}
    assert {ref.name for ref in document.tensors} == expected


def checkpoint(arch: str) -> dict[str, Shape]:
    """A checkpoint of one file that holds what the factories adapt, fused as the checkpoint has it."""
    prefixes = {
        "sd15": {"denoiser": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."},
        "sdxl": {
            "denoiser": "model.diffusion_model.",
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
        "flux": {"denoiser": "model.diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer."},
    }[arch]
    shapes = {}
    for weight in make.KOHYA_WEIGHTS[arch]:
        path, _, rows = weight.target.partition("[")
        out = weight.shape[0] * (3 if rows else 1)
        key = path + ("_weight" if path.endswith("in_proj") else "")
        shapes[prefixes[weight.component] + key] = (out, *weight.shape[1:])
    return shapes


def published(name: str, arch: str) -> tuple[Adapter, dict[str, Shape], dict[str, dict[str, Shape]]]:
    """What Kohya's trainer adapts of a published model, its checkpoint, and its diffusers folder."""
    file = SHARED / f"{name}.json"
    if not file.is_file():
        pytest.skip("the shared tables of names are not here")
    modules, single, folder = {}, {}, {}
    for component in json.loads(file.read_text())["components"].values():
        prefixes = component["prefixes"]
        for row in component["modules"]:
            shape, rows = tuple(row["shape"]), row["rows"]
            whole = (rows[-1] if rows else shape[0], *shape[1:])
            single[prefixes["native"] + row["native"]] = whole
            found = archs.get(arch).resolve(row["kohya"]) if row.get("kohya_made") else None
            if found is not None:
                target = Target(found.component, found.path, found.rows)
                mine = whole if found.rows is None else shape
                modules[target] = Module(target, "lora", {}, rank=2, shape=mine)
            folder.setdefault(prefixes["diffusers"].rstrip("."), {})[row["diffusers"]] = shape
    return Adapter(modules, arch=arch), single, folder


@pytest.mark.parametrize(
    ("name", "arch"), [("sd15", "sd15"), ("sd21", "sd2"), ("sdxl", "sdxl"), ("flux_dev", "flux")]
)
def test_all_that_a_trainer_adapts_is_in_the_published_models(name: str, arch: str) -> None:
    given, single, folder = published(name, arch)
    assert len(given.modules) > 200
    components = set(given.components())
    assert against(given, base(single)) is given
    assert (
        against(given, Base("folder", {part: base(each).parts[""] for part, each in folder.items()})) is given
    )
    assert len(components) == len(folder)


@pytest.mark.parametrize("arch", ["sd15", "sdxl", "flux"])
def test_names_of_a_table_are_looked_up_in_a_checkpoint(arch: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", arch)
    given = lt.load(made.path)
    shapes = checkpoint(arch)
    assert against(given, base(shapes)) is given
    lost = next(iter(shapes))
    with pytest.raises(NameResolutionError, match="1 of") as caught:
        against(given, base({key: shape for key, shape in shapes.items() if key != lost}))
    assert lost.endswith(caught.value.keys[0])
    with pytest.raises(ShapeError, match="1 of"):
        against(given, base({**shapes, lost: (7, *shapes[lost][1:])}))


@pytest.mark.parametrize("arch", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_names_of_a_table_are_looked_up_in_a_diffusers_folder(arch: str, layout: str, tmp_path: Path) -> None:
    """The folder has apart what the checkpoint has fused, and CLIP as transformers 5.6 writes it."""
    folder: dict[str, dict[str, torch.Tensor]] = {}
    for weight in make.DIFFUSERS_WEIGHTS[arch]:
        network, _, path = weight.diffusers.partition(".")
        name = "model" if network.startswith("text") else "diffusion_pytorch_model"
        path = path.removeprefix("text_model.")
        folder.setdefault(f"{network}/{name}.safetensors", {})[f"{path}.weight"] = torch.zeros(weight.shape)
    for file, tensors in folder.items():
        make.write_safetensors(tmp_path / "model" / file, tensors, None)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    maker = make.kohya if layout == "kohya" else make.diffusers
    given = lt.load(maker(tmp_path / "a.safetensors", arch).path)
    found = keys_of(tmp_path / "model")
    assert against(given, found) is given
    file = next(iter(folder))
    key = next(key for key in folder[file] if "to_out" in key)
    make.write_safetensors(tmp_path / "model" / file, {**folder[file], key: torch.zeros(7, 7)}, None)
    with pytest.raises(ShapeError, match=r"\[7, 7\]"):
        against(given, keys_of(tmp_path / "model"))


def test_a_component_that_the_base_lacks_whole_is_noted_and_kept(tmp_path: Path) -> None:
    given = lt.load(make.kohya(tmp_path / "a.safetensors", "flux").path)
    bare = {
        key.removeprefix("model.diffusion_model."): shape
        for key, shape in checkpoint("flux").items()
        if key.startswith("model.")
    }
    after = against(given, base(bare))
    assert list(after.modules) == list(given.modules)
    assert after.order == given.order
    assert any("no text_encoder: the names of its 1 modules" in note for note in after.notes)


def test_a_network_of_another_family_is_refused(tmp_path: Path) -> None:
    given = lt.load(make.kohya(tmp_path / "a.safetensors", "flux").path)
    with pytest.raises(NameResolutionError, match="none of the"):
        against(given, base({"model.layers.0.self_attn.q_proj": (4, 4)}))


def test_unknown_networks_of_a_pipeline_are_told_apart_by_their_component() -> None:
    network = {"blocks.0.attn.q": (4, 4)}
    given = adapter({"blocks_0_attn_q": (4, 4)}, "denoiser", "unknown")
    parts = {**base(network, part="transformer").parts, **base(network, part="text_encoder").parts}
    assert renamed(given, Base("folder", parts)) == {"blocks_0_attn_q": "blocks.0.attn.q"}
    other = base({"blocks.0.attn.q": (6, 4)}, part="text_encoder").parts
    with pytest.raises(ShapeError, match=r"\[6, 4\].*\[4, 4\]"):
        against(
            adapter({"blocks_0_attn_q": (6, 4)}, "denoiser", "unknown"), Base("folder", {**parts, **other})
        )
    marked = base(
        {"model.diffusion_model.blocks.0.attn.q": (4, 4), "first_stage_model.blocks.0.attn.q": (4, 4)}
    )
    assert renamed(given, marked) == {"blocks_0_attn_q": "blocks.0.attn.q"}


@pytest.mark.parametrize("lacking", [False, True])
def test_looking_up_does_not_compare_every_name_with_every_other(
    lacking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {f"model.layers.{n}.experts.{k}.w1": (4, 4) for n in range(20) for k in range(50)}
    names = [path.removeprefix("model.") for path in shapes] + ["layers.0.extra"] * lacking
    given = adapter(dict.fromkeys(names, (4, 4)))
    looked = 0
    moved = Paths.moved

    def counted(self: Paths, name: str, move: Move) -> Sequence[str]:
        nonlocal looked
        looked += 1
        return moved(self, name, move)

    monkeypatch.setattr(Paths, "moved", counted)
    if lacking:
        with pytest.raises(NameResolutionError, match="1 of 1001"):
            against(given, base(shapes))
    else:
        against(given, base(shapes))
    assert len(shapes) <= looked <= 5 * len(shapes)
