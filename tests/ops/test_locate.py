"""Which tensors of a base its adapters change."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import factories
import pytest
import torch

from loratools import archs
from loratools.errors import (
    ArchitectureError,
    NameResolutionError,
    OptionError,
    ShapeError,
    UnsupportedKindError,
)
from loratools.io.base import Base, keys_of
from loratools.model import Adapter, Module, Rows, Target
from loratools.ops import files
from loratools.ops._changes import Change, Plan, Term
from loratools.ops._locate import plan
from loratools.ops._pieces import spans
from loratools.ops._places import Place, Places
from tests.ops import bases as make

ORACLE = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracle"
_FAMILIES = ("peft_bake__", "peft_bake_multi__", "diffusers_", "kohya__")
_CASES = sorted(path.name for path in ORACLE.glob("*") if path.name.startswith(_FAMILIES) and path.is_dir())
_EXPERTS = "peft_bake__mixtral_target_parameters"


def _plan(base: Base, *adapters: Adapter, **options: Any) -> Plan:
    asked = {"arch": None, "components": None, "skip_missing": False, **options}
    return plan(base, adapters, [1.0] * len(adapters), **asked)


def _keys(made: Plan) -> list[str]:
    return [change.weight.key for change in made.changes]


# --- the oracle's files -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not _CASES, reason="the reference results are not beside this checkout")
@pytest.mark.parametrize("case", _CASES)
def test_oracle_plans_change_what_changed_and_nothing_else(case: str) -> None:
    from safetensors.torch import load_file

    folder = ORACLE / case
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    inputs, expected = manifest["inputs"], manifest["expected"]
    base = keys_of(folder / inputs["base"]["path"])
    names = [name for name in sorted(inputs) if name.startswith(("adapter", "lora"))]
    loaded = [files.load(folder / inputs[name]["path"]) for name in names]
    made = _plan(base, *loaded)
    before = load_file(folder / inputs["base"]["path"])
    name = next(name for name in ("fused_true", "fused", "merged") if name in expected)
    after = load_file(folder / expected[name]["path"])
    changed = [key for key in base.parts[""] if not torch.equal(before[key], after[key])]
    assert _keys(made) == changed
    assert made.matched == tuple(len(each.modules) for each in loaded)
    assert made.missing == ((),) * len(loaded)
    if case == _EXPERTS or len(loaded) > 1:
        return  # fused experts and DoRA after DoRA are the arithmetic's business
    for change in made.changes:
        if all(term.role == "weight" for term in change.terms):
            got = _applied(before[change.weight.key], change)
            torch.testing.assert_close(got, after[change.weight.key].double(), **_tolerance(before, change))


def _tolerance(before: dict[str, torch.Tensor], change: Change) -> dict[str, float]:
    rounded = before[change.weight.key].dtype == torch.bfloat16
    return {"rtol": 1e-2, "atol": 1e-2} if rounded else {"rtol": 1e-4, "atol": 1e-5}


def _applied(stored: torch.Tensor, change: Change) -> torch.Tensor:
    """The tensor with its terms' rows added, as (out, in) and back."""
    result = stored.double()
    for term in change.terms:
        assert term.module is not None
        whole = result.t() if term.turned else result
        whole = whole.clone()
        delta = term.module.delta(whole.float() if term.pieces else None).double()
        for start, stop, at in term.spans:
            rows = whole[at : at + stop - start]
            rows += delta[start:stop].reshape(rows.shape)
        result = whole.t() if term.turned else whole
    return result


# --- every table, in every dialect ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "component"), make.tabled())
def test_every_weight_of_every_dialect_is_found_row_for_row_in_every_other(arch: str, component: str) -> None:
    row = archs.get(arch).component(component)
    # One module for each name of each dialect: its rows of the weight, in its order.
    wanted = {}
    for dialect in make.dialects(row):
        for named, rows in make.spelt(row, dialect).values():
            wanted[Target(component, named.path, rows)] = named
    modules = [
        make.lora(target, len(make.rows_of(named, target.rows)), make.WIDTH)
        for target, named in wanted.items()
    ]
    for dialect in make.dialects(row):
        stored = make.spelt(row, dialect)
        if not stored:
            continue  # a dialect of some names alone, in which nobody stores a network
        shapes = {f"{name}.weight": (len(make.rows_of(*held)), make.WIDTH) for name, held in stored.items()}
        found = Places(make.base(shapes), arch, component).find(modules)
        assert (found.missing, found.ambiguous, found.misfits) == ([], {}, [])
        for target, named in wanted.items():
            assert _placed(found.places[target], stored) == make.rows_of(named, target.rows)


def _placed(place: Place, stored: dict[str, tuple[make.Named, Rows | None]]) -> list[int | None]:
    """Which row of the architecture's weight each row of a module is added to."""
    height = max(stop for piece in place.pieces for _, stop, _ in piece.spans)
    got: list[int | None] = [None] * height
    for piece in place.pieces:
        own = make.rows_of(*stored[piece.weight.key.removesuffix(".weight")])
        for start, stop, at in piece.spans:
            assert got[start:stop] == [None] * (stop - start)
            got[start:stop] = own[at : at + stop - start]
    return got


@pytest.mark.parametrize("name", sorted(name for name, arch in archs.all_archs().items() if arch.has_table))
@pytest.mark.parametrize("layout", ["checkpoint", "comfy", "diffusers"])
def test_components_are_found_behind_every_prefix_and_in_folders(name: str, layout: str) -> None:
    arch = archs.get(name)
    row = arch.components[0]
    named = next(iter(make.weights_of(row)))
    target = Target(row.name, named.path)
    module = make.lora(target, named.height, make.WIDTH)
    dialect = "diffusers" if layout == "diffusers" else "native"
    stored = make.spelt(row, dialect)
    shapes = {f"{name}.weight": (len(make.rows_of(*held)), make.WIDTH) for name, held in stored.items()}
    for prefix in row.prefixes[layout]:
        marked = make.base({prefix + key: shape for key, shape in shapes.items()})
        assert not Places(marked, name, row.name).find([module]).missing
        folder = make.base(shapes, part=prefix.rstrip("."))
        assert layout != "diffusers" or not Places(folder, name, row.name).find([module]).missing


def test_rows_in_any_shares_meet_where_they_are_the_same_rows() -> None:
    q, halves = Rows(((0, 1),), 3), Rows(((1, 2), (0, 1)), 2)
    assert spans(None, None, 6) == ((0, 6, 0),)
    assert spans(q, None, 6) == ((0, 2, 0),)
    assert spans(None, Rows(((2, 3),), 3), 2) == ((4, 6, 0),)
    assert spans(None, halves, 6) == ((0, 3, 3), (3, 6, 0))
    assert spans(halves, halves, 6) == ((0, 6, 0),)
    assert spans(Rows(((1, 2),), 3), halves, 6) == ((0, 1, 5), (1, 2, 0))
    # A third of seven rows is no number of rows.
    assert spans(q, None, 7) is None


# --- UNets of other depths --------------------------------------------------------------------------------------------


def _unet(*, resnets: int) -> dict[str, tuple[int, ...]]:
    """A UNet of two levels in diffusers' names, attention in the second; every weight has a height of its own."""
    names = ["conv_in"]
    for level in range(2):
        names += [f"down_blocks.{level}.resnets.{place}.conv1" for place in range(resnets)]
        names += [f"up_blocks.{level}.resnets.{place}.conv1" for place in range(resnets + 1)]
    names += [f"down_blocks.1.attentions.{place}.proj_in" for place in range(resnets)]
    names += [f"up_blocks.0.attentions.{place}.proj_in" for place in range(resnets + 1)]
    names += ["down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"]
    return {f"unet.{name}.weight": (10 + number, make.WIDTH) for number, name in enumerate(names)}


@pytest.mark.parametrize(
    ("resnets", "path", "key"),
    [
        (1, "input_blocks.2.0.op", "down_blocks.0.downsamplers.0.conv"),
        (1, "input_blocks.3.1.proj_in", "down_blocks.1.attentions.0.proj_in"),
        (1, "output_blocks_1_2_conv", "up_blocks.0.upsamplers.0.conv"),
        (1, "output_blocks.2.0.in_layers.2", "up_blocks.1.resnets.0.conv1"),
        (3, "input_blocks.4.0.op", "down_blocks.0.downsamplers.0.conv"),
        (3, "input_blocks.7.1.proj_in", "down_blocks.1.attentions.2.proj_in"),
        (3, "output_blocks.3.2.conv", "up_blocks.0.upsamplers.0.conv"),
    ],
)
def test_original_numbers_mean_what_they_do_in_a_unet_of_that_depth(
    resnets: int, path: str, key: str
) -> None:
    shapes = _unet(resnets=resnets)
    target = Target("denoiser", path)
    module = make.lora(target, shapes[f"unet.{key}.weight"][0], make.WIDTH)
    factors = {role: tensor.renamed(f"lora_unet_{tensor.name}") for role, tensor in module.factors.items()}
    found = Places(make.base(shapes), "sdxl", "denoiser").find([module._replace(factors=factors)])
    assert [piece.weight.key for piece in found.places[target].pieces] == [f"unet.{key}.weight"]


def test_names_of_diffusers_mean_the_same_at_any_depth() -> None:
    # What a file calls down_blocks.1.attentions.0 was read as the published UNet's number for it.
    target = Target("denoiser", "input_blocks.4.1.proj_in")
    key = "unet.down_blocks.1.attentions.0.proj_in.weight"
    shapes = _unet(resnets=1)
    module = make.lora(target, shapes[key][0], make.WIDTH)
    named = {role: tensor.renamed("unet.down_blocks.1.x") for role, tensor in module.factors.items()}
    found = Places(make.base(shapes), "sdxl", "denoiser").find([module._replace(factors=named)])
    assert [piece.weight.key for piece in found.places[target].pieces] == [key]


# --- plans ------------------------------------------------------------------------------------------------------------

_LAYER = "model.layers.0.self_attn"


def _llama(layers: int = 1) -> Base:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (20, 8), "lm_head.weight": (20, 8)}
    for layer in range(layers):
        for name in "qkv":
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (8, 8)
        shapes[f"model.layers.{layer}.self_attn.q_proj.bias"] = (8,)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (12, 8)
    return make.base(shapes)


def _module(path: str, out: int = 8, into: int = 8, **facts: Any) -> Module:
    return make.lora(Target("language_model", path), out, into)._replace(**facts)


def _llm(*modules: Module, layout: str = "peft") -> Adapter:
    return make.adapter(modules, "llm", layout)


def test_changes_come_in_the_order_of_the_base_and_terms_in_that_of_the_adapters() -> None:
    first = _llm(_module(f"{_LAYER}.v_proj"), _module(f"{_LAYER}.q_proj"))
    second = _llm(_module(f"{_LAYER}.q_proj"))
    made = plan(_llama(), [first, second], [0.5, -2.0], arch=None, components=None, skip_missing=False)
    assert _keys(made) == [f"{_LAYER}.q_proj.weight", f"{_LAYER}.v_proj.weight"]
    assert [(term.adapter, term.strength) for term in made.changes[0].terms] == [(0, 0.5), (1, -2.0)]
    assert made.matched == (2, 1)


@pytest.mark.parametrize(
    "path",
    [f"language_model.{_LAYER}.q_proj", "layers.0.self_attn.q_proj", "model_layers_0_self_attn_q_proj"],
)
def test_names_in_other_wrappers_and_flattened_ones_find_their_module(path: str) -> None:
    assert _keys(_plan(_llama(), _llm(_module(path)))) == [f"{_LAYER}.q_proj.weight"]


def test_a_bias_is_a_term_of_its_own() -> None:
    module = _module(f"{_LAYER}.q_proj")
    module = module._replace(factors={**module.factors, "up_bias": make.ref("b", 8)})
    made = _plan(_llama(), _llm(module))
    assert [(change.weight.key, change.terms[0].role) for change in made.changes] == [
        (f"{_LAYER}.q_proj.weight", "weight"),
        (f"{_LAYER}.q_proj.bias", "bias"),
    ]


def test_a_bias_that_the_base_lacks_is_missing() -> None:
    module = _module(f"{_LAYER}.v_proj")
    module = module._replace(factors={**module.factors, "up_bias": make.ref("b", 8)})
    with pytest.raises(NameResolutionError, match=r"v_proj\.bias"):
        _plan(_llama(), _llm(module))
    made = _plan(_llama(), _llm(module), skip_missing=True)
    assert made.missing == ((f"{_LAYER}.v_proj.bias",),)
    assert _keys(made) == [f"{_LAYER}.v_proj.weight"]


@pytest.mark.parametrize(("shape", "biases"), [((8, 1), True), ((1, 8), False)])
def test_ia3_along_the_outputs_multiplies_the_bias(shape: tuple[int, int], biases: bool) -> None:
    target = Target("language_model", f"{_LAYER}.q_proj")
    made = _plan(_llama(), _llm(Module(target, "ia3", {"ia3_l": make.ref("l", *shape)})))
    keys = [f"{_LAYER}.q_proj.weight", *([f"{_LAYER}.q_proj.bias"] if biases else [])]
    assert _keys(made) == keys
    # Its ΔW is made of the base weight.
    assert [piece.weight.key for piece in made.changes[0].terms[0].pieces] == keys[:1]


@pytest.mark.parametrize(("layout", "inside"), [("peft", True), ("diffusers", True), ("kohya", False)])
def test_the_strength_goes_inside_the_norm_of_pefts_dora_alone(layout: str, inside: bool) -> None:
    module = _module(f"{_LAYER}.q_proj", magnitude=make.ref("m", 8), magnitude_axis="out")
    (term,) = _only(_plan(_llama(), _llm(module, layout=layout))).terms
    assert term.inside is inside
    assert len(term.pieces) == 1


def _only(made: Plan) -> Change:
    (change,) = made.changes
    return change


def _gpt2() -> Base:
    return make.base(
        {
            "transformer.wte.weight": (20, 8),
            "transformer.h.0.attn.c_attn.weight": (8, 24),
            "transformer.h.0.attn.c_attn.bias": (24,),
            "transformer.h.0.attn.c_proj.weight": (8, 8),
            "transformer.h.0.attn.c_proj.bias": (8,),
        }
    )


@pytest.mark.parametrize("in_first", [True, False])
@pytest.mark.parametrize(("name", "out"), [("attn.c_attn", 24), ("attn.c_proj", 8)])
def test_conv1d_is_turned_whatever_the_adapter_says(name: str, out: int, in_first: bool) -> None:
    term: Term = _only(
        _plan(_gpt2(), _llm(_module(f"transformer.h.0.{name}", out, 8, in_first=in_first)))
    ).terms[0]
    assert term.turned
    assert term.spans == ((0, out, 0),)


def test_an_embedding_is_turned() -> None:
    module = _module("model.embed_tokens", 8, 20, op="embedding", in_first=True)
    assert _only(_plan(_llama(), _llm(module))).terms[0].turned


def test_a_linear_layer_is_not_turned_though_the_adapter_says_so() -> None:
    module = _module("model.layers.0.mlp.up_proj", 12, 8, in_first=True)
    assert not _only(_plan(_llama(), _llm(module))).terms[0].turned


# --- what has no place ------------------------------------------------------------------------------------------------


def test_an_adapter_that_matches_nothing_is_refused_even_where_missing_ones_may_be() -> None:
    for skip in (False, True):
        with pytest.raises(NameResolutionError, match="none of the 1 modules is in"):
            _plan(_llama(), _llm(_module("encoder.block.7.dense")), skip_missing=skip)


def test_what_matches_partly_is_refused_with_count_and_blocks_or_listed() -> None:
    modules = [_module(f"model.layers.{layer}.self_attn.q_proj") for layer in range(4)]
    with pytest.raises(NameResolutionError) as caught:
        _plan(_llama(layers=3), _llm(*modules))
    assert "1 of 4 modules target weights that base.safetensors does not have" in str(caught.value)
    assert "with 4 model.layers or more; the base has 3" in str(caught.value)
    assert "--skip-missing to bake the other 3" in str(caught.value)
    made = _plan(_llama(layers=3), _llm(*modules), skip_missing=True)
    assert made.missing == (("model.layers.3.self_attn.q_proj",),)
    assert made.matched == (3,)


def test_a_component_that_the_base_lacks_is_missing() -> None:
    shapes = {"down_blocks.0.resnets.0.conv1.weight": (8, 8), "conv_in.weight": (8, 4, 3, 3)}
    denoiser = make.lora(Target("denoiser", "input_blocks.1.0.in_layers.2"), 8, 8)
    encoder = make.lora(Target("text_encoder", "text_model.encoder.layers.0.mlp.fc1"), 8, 8)
    both = make.adapter([denoiser, encoder], "sd15")
    with pytest.raises(NameResolutionError, match="1 of 2 modules"):
        _plan(make.base(shapes), both)
    assert _plan(make.base(shapes), both, components={"denoiser"}).left_out == (1,)


def test_a_component_that_a_folder_lacks_is_missing_and_so_are_tensors_of_no_module() -> None:
    base = make.base({"down_blocks.0.resnets.0.conv1.weight": (8, 8)}, "unet")
    denoiser = make.lora(Target("denoiser", "input_blocks.1.0.in_layers.2"), 8, 8)
    encoder = make.lora(Target("text_encoder", "text_model.encoder.layers.0.mlp.fc1"), 8, 8)
    both = make.adapter([denoiser, encoder], "sd15", "peft")
    saved = "base_model.model.classifier.weight"
    whole = replace(both, extras={saved: make.ref(saved, 2, 8)})
    made = _plan(base, whole, skip_missing=True)
    assert made.missing == ((saved, str(encoder.target)),)
    assert made.matched == (1,)


def test_a_component_that_nobody_has_is_refused() -> None:
    with pytest.raises(OptionError, match="Did you mean: language_model"):
        _plan(_llama(), _llm(_module(f"{_LAYER}.q_proj")), components={"language_modle"})


def test_a_choice_of_components_that_leaves_nothing_is_refused() -> None:
    module = make.lora(Target("denoiser", "input_blocks.1.0.in_layers.2"), 8, 8)
    base = make.base({"down_blocks.0.resnets.0.conv1.weight": (8, 8)})
    with pytest.raises(OptionError, match="no adapter changes text_encoder"):
        _plan(base, make.adapter([module], "sd15"), components={"text_encoder"})


def test_shapes_that_do_not_fit_are_named_with_both() -> None:
    with pytest.raises(ShapeError, match=r"the adapter's is \[8, 9\], the base's \[8, 8\]"):
        _plan(_llama(), _llm(_module(f"{_LAYER}.q_proj", 8, 9)), skip_missing=True)
    with pytest.raises(ShapeError, match="Both look like language model, of different widths"):
        _plan(_llama(), _llm(_module(f"{_LAYER}.q_proj", 8, 9)))


def test_an_inpainting_model_is_called_so() -> None:
    target = Target("denoiser", "input_blocks.0.0")
    module = make.lora(target, 32, 4, op="conv")._replace(shape=(32, 4, 3, 3))
    with pytest.raises(ShapeError, match="as inpainting models do"):
        _plan(make.base({"conv_in.weight": (32, 9, 3, 3)}), make.adapter([module], "sd15"))


def test_convolutions_of_one_and_flattened_ones_are_linear_layers() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "conv_in.weight": (32, 4, 3, 3),
        "down_blocks.0.attentions.0.proj_in.weight": (8, 8, 1, 1),
    }
    flat = make.lora(Target("denoiser", "input_blocks.0.0"), 32, 36)
    one = make.lora(Target("denoiser", "input_blocks.1.1.proj_in"), 8, 8)
    assert len(_plan(make.base(shapes), make.adapter([flat, one], "sd15")).changes) == 2


def test_adapters_of_different_architectures_are_refused() -> None:
    flux = make.adapter([make.lora(Target("denoiser", "img_in"), 8, 8)], "flux")
    with pytest.raises(ArchitectureError, match="different architectures"):
        _plan(_llama(), _llm(_module(f"{_LAYER}.q_proj")), flux)


def test_names_that_may_mean_two_modules_are_refused() -> None:
    shapes = {f"{tower}.layers.0.fc.weight": (8, 8) for tower in ("audio", "video")}
    with pytest.raises(NameResolutionError, match="may be"):
        _plan(make.base(shapes), _llm(_module("layers.0.fc")))


def test_an_adapter_of_another_model_is_told_so() -> None:
    stem = "transformer_blocks.0.attn2.to_k"
    shapes = {f"model.diffusion_model.middle_block.1.{stem}.weight": (1280, 2048)}
    module = make.lora(Target("denoiser", f"middle_block.1.{stem}"), 1280, 768)
    with pytest.raises(ShapeError) as caught:
        _plan(make.base(shapes), make.adapter([module], "sd15"))
    assert "looks like Stable Diffusion 1.x; the base looks like Stable Diffusion XL" in str(caught.value)


# --- what only the base tells -----------------------------------------------------------------------------------------


def test_the_base_decides_between_architectures_that_an_adapter_may_be_of() -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    module = make.lora(Target("denoiser", name), 320, 1024)
    open_one = replace(make.adapter([module]), candidates=("sd15", "sd2"))
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    made = _plan(make.base({key: (320, 1024)}), open_one)
    assert (made.arch, _keys(made)) == ("sd2", [key])


def test_an_adapter_is_read_again_where_the_base_is_of_a_relative(tmp_path: Path) -> None:
    # The last block's norm has its halves exchanged in diffusers: the 24th of Medium, but not of Large.
    name = "transformer_blocks.23.norm1_context.linear"
    factors = {"lora_A": torch.ones(1, 4), "lora_B": torch.arange(8.0)[:, None]}
    path = tmp_path / "block.safetensors"
    tensors = {f"transformer.{name}.{role}.weight": value for role, value in factors.items()}
    for other in ("attn.to_q", "attn.add_q_proj", "attn.to_add_out"):
        tensors[f"transformer.transformer_blocks.23.{other}.lora_A.weight"] = torch.ones(1, 4)
        tensors[f"transformer.transformer_blocks.23.{other}.lora_B.weight"] = torch.ones(4, 1)
    factories.write_safetensors(path, tensors, None)
    read = files.load(path, arch="sd3")
    stored = {}
    for block in range(38):
        stem = f"model.diffusion_model.joint_blocks.{block}.context_block"
        stored[f"{stem}.adaLN_modulation.1.weight"] = (8, 4)
        stored[f"{stem}.attn.qkv.weight"] = (12, 4)
        stored[f"{stem}.attn.proj.weight"] = (4, 4)
        stored[f"{stem.replace('context', 'x')}.attn.qkv.weight"] = (12, 4)
    made = _plan(make.base(stored), read)
    assert made.arch == "sd35_large"
    norm = next(change for change in made.changes if "adaLN" in change.weight.key)
    assert norm.terms[0].spans == ((0, 8, 0),)


def test_of_two_transformers_the_first_changes_and_a_note_says_so() -> None:
    keys = {"blocks.0.attn1.to_q.weight": (8, 8)}
    parts = {name: make.base(keys, name).parts[name] for name in ("transformer", "transformer_2")}
    module = make.lora(Target("denoiser", "blocks.0.self_attn.q"), 8, 8)
    made = _plan(Base("folder", parts), make.adapter([module], "wan"))
    assert [change.part for change in made.changes] == ["transformer"]
    assert "transformer and transformer_2" in made.notes[0]
    tensors = {role: ref.renamed(f"transformer_2.{role}") for role, ref in module.factors.items()}
    second = make.adapter([module._replace(factors=tensors)], "wan")
    assert [change.part for change in _plan(Base("folder", parts), second).changes] == ["transformer_2"]


@pytest.mark.parametrize("packed", ["weight", "qweight"])
def test_packed_weights_are_refused_by_name(packed: str) -> None:
    stem = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{stem}.{packed}": make.weight(f"{stem}.{packed}", 4, 8, dtype="I32"),
        f"{stem}.scales": make.weight(f"{stem}.scales", 1, 8),
        f"{stem}.bias": make.weight(f"{stem}.bias", 8),
    }
    with pytest.raises(UnsupportedKindError, match=r"quantised.*q_proj"):
        _plan(Base("base.safetensors", {"": tensors}), _llm(_module(stem)))


def test_float8_weights_come_with_their_scales() -> None:
    key = f"{_LAYER}.q_proj.weight"
    tensors = {
        key: make.weight(key, 8, 8, dtype="F8_E4M3"),
        f"{key}_scale": make.weight(f"{key}_scale", 1, dtype="F32"),
    }
    module = _module(f"{_LAYER}.q_proj", magnitude=make.ref("m", 8), magnitude_axis="out")
    change = _only(_plan(Base("base.safetensors", {"": tensors}), _llm(module)))
    assert change.scale == change.terms[0].pieces[0].scale == tensors[f"{key}_scale"]


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys, loratools.ops._locate as l; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
