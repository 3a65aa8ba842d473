"""Experts from style to style: exact, whole, and the first file again on the way back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools import kinds
from loratools.archs import _experts as names
from loratools.errors import LayoutError, LoraError, NameResolutionError, OptionError, ShapeError
from loratools.model import Adapter, Layout, Module, Target
from loratools.ops import _moe_known, _moe_open
from loratools.ops.convert import convert, convert_file
from loratools.tensors import from_torch

BLOCK = "model.layers.0."
HIDDEN, MIDDLE = 6, 4
Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."


def folder(path: Path, tensors: Tensors, **config: Any) -> Path:
    path.mkdir(parents=True)
    save_file(
        {PREFIX + key: value.contiguous() for key, value in tensors.items()},
        path / "adapter_model.safetensors",
    )
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["x"], **config}
    (path / "adapter_config.json").write_text(json.dumps(said))
    return path


def pair(stem: str, out: int, width: int, rank: int) -> Tensors:
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, width),
        f"{stem}.lora_B.weight": torch.randn(out, rank),
    }


def single(family: str, ranks: Mapping[tuple[int, str], int]) -> Tensors:
    """A module for each expert and role, as (number, role) has it, of a rank."""
    known = next(each for each in names.FAMILIES if each.name == family)
    found: Tensors = {}
    for (number, role), rank in ranks.items():
        sides = (HIDDEN, MIDDLE) if role == "down" else (MIDDLE, HIDDEN)
        found |= pair(names.spell(known, "split", BLOCK, role, number), *sides, rank)
    return found


def every(count: int, rank: int = 2) -> dict[tuple[int, str], int]:
    return {(number, role): rank for number in range(count) for role in ("gate", "up", "down")}


def base(path: Path, model_type: str, count: int = 3) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "num_local_experts": count}))
    return path


def weights(path: Path) -> Tensors:
    return load_file(path / "adapter_model.safetensors")


def same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_per_expert_becomes_what_peft_makes_of_it_and_is_itself_again(shared: Path, tmp_path: Path) -> None:
    case = shared / "oracle" / "peft_convert__mixtral_per_expert_to_fused"
    given, fused, back = case / "input" / "adapter", tmp_path / "fused", tmp_path / "back"
    convert_file(given, fused, to="peft", experts="fused")
    wanted = load_file(case / "expected" / "fused_state_dict.safetensors")
    same(weights(fused), {key: wanted[key] for key in sorted(wanted)})
    config = json.loads((fused / "adapter_config.json").read_text())
    assert config["target_parameters"] == [
        f"{BLOCK}mlp.experts.{leaf}" for leaf in ("down_proj", "gate_up_proj")
    ]
    assert list(config["rank_pattern"].values()) == [4]
    assert list(config["alpha_pattern"].values()) == [12]
    convert_file(fused, back, to="peft", experts="split", base=case / "input" / "base")
    same(weights(back), weights(given))


def test_packed_experts_are_written_as_they_came(shared: Path, tmp_path: Path) -> None:
    given = shared / "oracle" / "peft_bake__mixtral_target_parameters" / "input" / "adapter"
    convert_file(given, tmp_path / "out", to="peft", dtype="float32")
    same(weights(tmp_path / "out"), weights(given))


@pytest.mark.parametrize("stored", ["fused", "split"])
@pytest.mark.parametrize("style", ["given", "split", "mlx", "gguf"])
def test_every_form_bakes_into_every_form_of_base(
    shared: Path, tmp_path: Path, style: str, stored: str
) -> None:
    case = shared / "oracle" / "peft_bake__mixtral_target_parameters"
    adapter, model = case / "input" / "adapter", case / "input" / "base"
    merged = load_file(case / "expected" / "merged.safetensors")
    if style != "given":
        out = tmp_path / ("adapter.gguf" if style == "gguf" else "adapter")
        to = "peft" if style == "split" else style
        convert_file(adapter, out, to=to, base=model, experts="split" if style == "split" else "keep")
        adapter = out
    if stored == "split":
        merged = apart(merged)
        own = tmp_path / "base"
        own.mkdir()
        save_file(apart(load_file(model / "model.safetensors")), own / "model.safetensors")
        (own / "config.json").write_bytes((model / "config.json").read_bytes())
        model = own
    report = lt.bake(model, [adapter], tmp_path / "baked")
    found = load_file(tmp_path / "baked" / "model.safetensors")
    assert found.keys() == merged.keys()
    for key, value in merged.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    assert lt.verify(model, [adapter], tmp_path / "baked").ok
    assert report is not None


def apart(tensors: Tensors) -> Tensors:
    """A Mixtral checkpoint with a tensor for each expert."""
    found: Tensors = {}
    for key, value in tensors.items():
        place = names.place(key)
        if place is None:
            found[key] = value
            continue
        for number, whole in enumerate(value):
            parts = (
                {"down": whole}
                if place.role == "down"
                else dict(zip(("gate", "up"), whole.chunk(2), strict=True))
            )
            for role, part in parts.items():
                name = names.spell(names.FAMILIES[0], "split", place.block, role, number)
                found[f"{name}.weight"] = part.contiguous()
    return found


RANKS = st.dictionaries(
    st.tuples(st.integers(0, 3), st.sampled_from(["gate", "up", "down"])), st.integers(1, 3), min_size=1
)


@settings(deadline=None, max_examples=20)
@given(ranks=RANKS, family=st.sampled_from(["mixtral", "qwen2_moe", "lfm2_moe", "gpt_oss", "llama4"]))
def test_split_again_gives_the_first_file(
    tmp_path_factory: pytest.TempPathFactory, ranks: dict[tuple[int, str], int], family: str
) -> None:
    place = tmp_path_factory.mktemp("law")
    torch.manual_seed(len(ranks))
    tensors = single(family, ranks)
    pattern = {stem: tensors[f"{stem}.lora_A.weight"].shape[0] for stem in _stems(tensors)}
    given = folder(
        place / "given", tensors, rank_pattern=pattern, alpha_pattern={k: 3 * v for k, v in pattern.items()}
    )
    model = base(place / "base", family, 4)
    convert_file(given, place / "fused", to="peft", experts="fused", base=model)
    assert lt.load(place / "fused").kinds == {"experts": len({role == "down" for _, role in ranks})}
    convert_file(place / "fused", place / "back", to="peft", experts="split", base=model)
    same(weights(place / "back"), weights(given))


def _stems(tensors: Tensors) -> set[str]:
    return {key.partition(".lora_")[0] for key in tensors}


def test_gate_and_up_that_share_their_down_keep_the_rank(tmp_path: Path) -> None:
    tensors = single("mixtral", every(2))
    for number in range(2):
        stem = f"{BLOCK}block_sparse_moe.experts.{number}"
        tensors[f"{stem}.w3.lora_A.weight"] = tensors[f"{stem}.w1.lora_A.weight"].clone()
    given = folder(tmp_path / "given", tensors)
    convert_file(given, tmp_path / "fused", to="peft", experts="fused")
    fused = weights(tmp_path / "fused")
    assert fused[f"{PREFIX}{BLOCK}mlp.experts.base_layer.lora_A.weight"].shape == (4, HIDDEN)
    convert_file(
        tmp_path / "fused",
        tmp_path / "back",
        to="peft",
        experts="split",
        base=base(tmp_path / "b", "mixtral", 2),
    )
    same(weights(tmp_path / "back"), weights(given))


def test_scales_that_differ_become_one(tmp_path: Path) -> None:
    tensors = single("qwen2_moe", every(2))
    given = folder(tmp_path / "given", tensors, alpha_pattern={r"experts\.1\.up_proj": 24, "0.down_proj": 3})
    before = {str(target): kinds.delta(module) for target, module in lt.load(given).modules.items()}
    convert_file(given, tmp_path / "mlx", to="mlx")
    for target, module in lt.load(tmp_path / "mlx").modules.items():
        block, leaf = target.path.rsplit(".switch_mlp.")
        for number, delta in enumerate(kinds.delta(module)):
            torch.testing.assert_close(delta, before[f"{block}.experts.{number}.{leaf}"])


def test_rows_alternate_in_gpt_oss(tmp_path: Path) -> None:
    given = folder(tmp_path / "given", single("gpt_oss", every(2)))
    convert_file(
        given, tmp_path / "fused", to="peft", experts="fused", base=base(tmp_path / "base", "gpt_oss", 2)
    )
    before = lt.load(given).modules
    found = _moe_known.known(lt.load(tmp_path / "fused")).modules
    whole = kinds.delta(found[Target("language_model", f"{BLOCK}mlp.experts.gate_up_proj")])
    for number in range(2):
        for start, leaf in enumerate(("gate_proj", "up_proj")):
            own = before[Target("language_model", f"{BLOCK}mlp.experts.{number}.{leaf}")]
            torch.testing.assert_close(whole[number, start::2], kinds.delta(own))


def packed(count: int, rank: int, *, turned: bool = False, owner: str = "mlp.experts") -> Tensors:
    gate_up, down = (2 * MIDDLE, HIDDEN), (HIDDEN, MIDDLE)
    if turned:
        gate_up, down = gate_up[::-1], down[::-1]
    stem = f"{BLOCK}{owner}"
    return pair(f"{stem}.base_layer", *gate_up, rank * count) | pair(stem, *down, rank * count)


def test_llama4s_factors_are_those_of_transposed_weights_as_shapes_show(tmp_path: Path) -> None:
    owner = "feed_forward.experts"
    tensors = packed(3, 2, turned=True, owner=owner)
    given = folder(tmp_path / "given", tensors, target_parameters=["gate_up_proj", "down_proj"])
    model = base(tmp_path / "base", "llama4_text")
    convert_file(given, tmp_path / "split", to="peft", experts="split", base=model)
    stored = _moe_known.known(lt.load(given)).modules
    whole = kinds.delta(stored[Target("language_model", f"{BLOCK}{owner}.gate_up_proj")])
    parts = lt.load(tmp_path / "split").modules
    for number in range(3):
        for half, leaf in enumerate(("gate_proj", "up_proj")):
            own = kinds.delta(parts[Target("language_model", f"{BLOCK}{owner}.{number}.{leaf}")])
            columns = slice(half * MIDDLE, (half + 1) * MIDDLE)
            torch.testing.assert_close(own.T, whole[number][:, columns])
    convert_file(tmp_path / "split", tmp_path / "back", to="peft", experts="fused", base=model)
    again = _moe_known.known(lt.load(tmp_path / "back")).modules
    for target, module in stored.items():
        torch.testing.assert_close(kinds.delta(again[target]), kinds.delta(module))


def test_shapes_tell_which_wrapper_is_whose(tmp_path: Path) -> None:
    tensors = packed(3, 2)
    exchanged = {
        (
            key.replace(".base_layer", "")
            if "base_layer" in key
            else key.replace("experts", "experts.base_layer")
        ): value
        for key, value in tensors.items()
    }
    given = folder(
        tmp_path / "given", exchanged, target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    )
    found = _moe_known.known(lt.load(given)).modules
    assert {target.path.rpartition(".")[2]: module.shape for target, module in found.items()} == {
        "gate_up_proj": (3, 2 * MIDDLE, HIDDEN),
        "down_proj": (3, HIDDEN, MIDDLE),
    }


def test_what_nothing_tells_is_asked_for(tmp_path: Path) -> None:
    owners = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    given = folder(tmp_path / "given", packed(3, 2), r=4, target_parameters=owners)
    with pytest.raises(ShapeError, match=r"6 directions .* says rank 4.*--experts-count"):
        convert_file(given, tmp_path / "a", to="peft", experts="split")
    with pytest.raises(LayoutError, match=r"mixtral and qwen2_moe and gpt_oss.*--base"):
        convert_file(given, tmp_path / "a", to="peft", experts="split", experts_count=3)
    named = folder(
        tmp_path / "named",
        packed(3, 2),
        r=4,
        target_parameters=owners,
        base_model_name_or_path="Qwen/Qwen3-30B-A3B",
    )
    convert_file(named, tmp_path / "a", to="peft", experts="split", experts_count=3)
    assert Target("language_model", f"{BLOCK}mlp.experts.2.up_proj") in lt.load(tmp_path / "a").modules
    some = folder(tmp_path / "some", single("mixtral", {(0, "gate"): 2, (2, "gate"): 2}))
    with pytest.raises(LayoutError, match="highest number of an expert is 2"):
        convert_file(some, tmp_path / "b", to="peft", experts="fused")
    convert_file(some, tmp_path / "b", to="peft", experts="fused", experts_count=5)
    (module,) = _moe_known.known(lt.load(tmp_path / "b")).modules.values()
    assert module.shape == (5, 2 * MIDDLE, HIDDEN)


def test_a_base_without_experts_is_not_theirs(tmp_path: Path) -> None:
    given = folder(tmp_path / "given", single("mixtral", every(2)))
    model = base(tmp_path / "model", "llama")
    # A configuration alone says nothing of the names.
    convert_file(given, tmp_path / "out", to="vllm", base=model)
    stored = {
        BLOCK + "mlp.up_proj.weight": torch.zeros(MIDDLE, HIDDEN),
        "lm_head.weight": torch.zeros(5, HIDDEN),
    }
    save_file(stored, model / "model.safetensors")
    with pytest.raises(NameResolutionError, match="6 modules are of experts") as caught:
        convert_file(given, tmp_path / "again", to="vllm", base=model)
    assert any("experts.0" in key for key in caught.value.keys)
    assert not (tmp_path / "again").exists()
    save_file(
        {**stored, BLOCK + "mlp.experts.gate_up_proj": torch.zeros(2, 8, 6)}, model / "model.safetensors"
    )
    convert_file(given, tmp_path / "again", to="vllm", base=model)


def test_models_are_known_by_their_published_names() -> None:
    found = {
        name: family.name if (family := names.of_model_name(name)) is not None else ""
        for name in (
            *("mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen1.5-MoE-A2.7B"),
            *("openai/gpt-oss-20b", "allenai/OLMoE-1B-7B-0924", "deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-8B"),
        )
    }
    assert list(found.values()) == ["mixtral", "qwen2_moe", "", "gpt_oss", "qwen2_moe", "qwen2_moe", ""]


def test_dora_on_an_expert_is_refused_by_name(tmp_path: Path) -> None:
    tensors = single("mixtral", every(2))
    tensors[f"{BLOCK}block_sparse_moe.experts.1.w2.lora_magnitude_vector"] = torch.ones(HIDDEN)
    given = folder(tmp_path / "given", tensors, use_dora=True)
    with pytest.raises(LoraError, match="DoRA"):
        convert_file(given, tmp_path / "out", to="peft", experts="fused")


def test_a_layout_without_names_for_a_style_says_which_it_has(tmp_path: Path) -> None:
    given = folder(tmp_path / "given", single("mixtral", every(2)))
    with pytest.raises(LoraError, match=r"mlx layout has no names for experts that are split.*switch"):
        convert(lt.load(given), "mlx", experts="split")


def test_norms_are_those_of_all_experts_together(tmp_path: Path) -> None:
    owners = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    given = folder(tmp_path / "given", packed(3, 2), target_parameters=owners)
    shown = {module.target: module for module in lt.info(given).modules}
    for target, module in _moe_known.known(lt.load(given)).modules.items():
        delta = kinds.delta(module)
        one = shown[target.path]
        assert (one.shape, one.rank, one.scale) == (tuple(delta.shape), 2, 3.0)
        sigma = torch.linalg.svdvals(delta)
        assert one.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert one.spectral_norm == pytest.approx(float(sigma.max()), rel=1e-5)
        assert one.energy == pytest.approx({1: float((sigma[:, 0] ** 2).sum() / (sigma**2).sum())}, rel=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties", "svd", "dare-linear", "magnitude"])
def test_every_method_merges_expert_by_expert(tmp_path: Path, method: str) -> None:
    inputs = [folder(tmp_path / str(n), single("mixtral", every(2, rank=n + 1))) for n in (1, 2)]
    fused = [tmp_path / f"fused{n}" for n in (1, 2)]
    for single_ones, out in zip(inputs, fused, strict=True):
        convert_file(single_ones, out, to="peft", experts="fused")
    options: dict[str, Any] = {"weights": [0.5, -0.25], "method": method}
    whole = lt.merge([lt.load(path) for path in fused], **options)
    opened, closing = _moe_open.opened([lt.load(path) for path in fused], None)
    one_by_one = lt.merge(opened, **options)
    for target, module in whole.modules.items():
        for number, delta in enumerate(kinds.delta(module)):
            own = one_by_one.modules[target._replace(path=f"{target.path}.{number}")]
            torch.testing.assert_close(delta, kinds.delta(own), rtol=1e-4, atol=1e-5)
    assert len(closing.counts) == len(whole.modules) == 2
    lt.save(whole, tmp_path / "merged")
    read = _moe_known.known(lt.load(tmp_path / "merged")).modules
    for target, module in whole.modules.items():
        torch.testing.assert_close(kinds.delta(read[target]), kinds.delta(module))


def test_adapters_of_other_numbers_of_experts_are_not_merged(tmp_path: Path) -> None:
    owners = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    paths = [folder(tmp_path / str(n), packed(n, 2), target_parameters=owners) for n in (2, 3)]
    with pytest.raises(ShapeError, match="of 2 experts, and another of 3"):
        lt.merge([lt.load(path) for path in paths])


def test_rules_that_look_beyond_the_experts_are_refused(tmp_path: Path) -> None:
    owners = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    given = lt.load(folder(tmp_path / "given", packed(3, 2), target_parameters=owners))
    with pytest.raises(OptionError, match=r"--size cannot be combined .*--experts split"):
        lt.resize(given, size="1MB")


def test_a_count_that_contradicts_the_factors_is_refused() -> None:
    factors = {"up": from_torch("up", torch.ones(4, 6)), "down": from_torch("down", torch.ones(6, 4))}
    target = Target("language_model", f"{BLOCK}mlp.experts")
    config = {"r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.down_proj"]}
    adapter = Adapter({target: Module(target, "experts", factors)}, layout=Layout("peft"), config=config)
    with pytest.raises(ShapeError, match="4 experts were given"):
        _moe_known.known(adapter, 4)
    with pytest.raises(NameResolutionError, match="1 packed modules, and target_parameters names 2"):
        _moe_known.known(
            replace(adapter, config={**config, "target_parameters": ["down_proj", "gate_up_proj"]})
        )
