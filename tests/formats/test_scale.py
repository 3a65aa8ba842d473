"""What multiplies up · down: alpha over rank, as each layout states it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools.errors import MalformedFileError, UnsupportedKindError
from loratools.formats import _peft_config, _peft_special


def scales(path: Path) -> dict[str, float]:
    return {make.key_of(t.component, str(t)): m.scale for t, m in lt.load(path).modules.items()}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("alpha", [16.0, -2.0, 0.0])
def test_alpha_of_any_dtype_and_shape(
    alpha: float, dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    like = torch.zeros(shape, dtype=dtype)
    made = make.kohya(tmp_path / "a.safetensors", alpha=alpha, alpha_like=like, rank=4, only=["attn1_to_q"])
    adapter = lt.load(made.path, arch="sd15")
    (module,) = adapter.modules.values()
    assert (module.alpha, module.scale) == (alpha, alpha / 4)
    make.assert_close(make.deltas_of(adapter), made.deltas)


def test_a_fractional_alpha_is_not_rounded(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", alpha=0.1, rank=3, only=["attn1_to_q"])
    (module,) = lt.load(made.path).modules.values()
    assert module.scale == float(torch.tensor(0.1)) / 3


def test_without_alpha_kohyas_scale_is_one(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", alpha=None)
    for module in lt.load(made.path).modules.values():
        assert (module.alpha, module.scale) == (None, 1.0)


def test_an_alpha_of_several_numbers_is_refused_by_name(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", alpha_like=torch.zeros(2), only=["attn1_to_q"], alpha=None)
    tensors = {
        **made.tensors,
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha": torch.ones(2),
    }
    make.write_safetensors(made.path, tensors, None)
    with pytest.raises(MalformedFileError, match=r"attn1_to_q\.alpha.*\[2\]"):
        lt.load(made.path)


def test_diffusers_header_is_per_component(tmp_path: Path) -> None:
    header = {
        "unet": {"r": 4, "lora_alpha": 8, "use_rslora": False},
        "text_encoder": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    }
    made = make.diffusers(
        tmp_path / "a.safetensors", rank=4, header=header, scales={"text_encoder.": 1.0, "unet.": 2.0}
    )
    make.assert_close(make.deltas_of(lt.load(made.path)), made.deltas)


def test_diffusers_header_patterns(tmp_path: Path) -> None:
    header = {
        "unet": {
            "r": 4,
            "lora_alpha": 4,
            "rank_pattern": {"attn1.to_q": 2},
            "alpha_pattern": {"attn1.to_q": 8, r"down_blocks.*attn2\.to_[kv]": 1},
        }
    }
    made = make.diffusers(
        tmp_path / "a.safetensors",
        rank=4,
        only=["unet."],
        header=header,
        ranks={"attn1.to_q": 2},
        scales={"attn1.to_q": 4.0, "attn2.to_": 0.25},
    )
    make.assert_close(make.deltas_of(lt.load(made.path)), made.deltas)


def test_diffusers_header_without_a_prefix_is_for_a_bare_model(tmp_path: Path) -> None:
    made = make.diffusers(
        tmp_path / "a.safetensors",
        prefix=False,
        rank=4,
        header={"": {"r": 4, "lora_alpha": 12}},
        scales={"unet.": 3.0},
    )
    make.assert_close(make.deltas_of(lt.load(made.path)), made.deltas)


def test_diffusers_rslora_in_the_header(tmp_path: Path) -> None:
    made = make.diffusers(
        tmp_path / "a.safetensors",
        rank=4,
        only=["unet."],
        header={"unet": {"r": 4, "lora_alpha": 8, "use_rslora": True}},
        scales={"unet.": 4.0},
    )
    make.assert_close(make.deltas_of(lt.load(made.path)), made.deltas)


@pytest.mark.parametrize("generation", ["peft-keys", "lora-updown", "attn-procs"])
def test_network_alphas_beside_diffusers_factors(generation: str, tmp_path: Path) -> None:
    made = make.diffusers(tmp_path / "a.safetensors", generation=generation, rank=4, network_alpha=1.0)
    adapter = lt.load(made.path)
    assert not adapter.extras
    make.assert_close(make.deltas_of(adapter), made.deltas)
    make.assert_round_trip(made, tmp_path / "b.safetensors")


def test_a_diffusers_file_that_says_nothing_has_alpha_equal_to_rank(tmp_path: Path) -> None:
    made = make.diffusers(tmp_path / "a.safetensors", rank=4, ranks={"attn2": 2})
    assert set(scales(made.path).values()) == {1.0}


def test_a_broken_diffusers_header_is_named(tmp_path: Path) -> None:
    made = make.diffusers(tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": "{not json"})
    with pytest.raises(MalformedFileError, match="lora_adapter_metadata"):
        lt.load(made.path)


def test_peft_patterns_first_match_in_the_files_order(tmp_path: Path) -> None:
    patterns = {"q_proj": 4, "model.layers.1.self_attn.q_proj": 400, r"layers\.\d+\.mlp\..*": 6, "proj": 900}
    made = make.peft(tmp_path / "a", rank=4, alpha=8, config={"alpha_pattern": patterns})
    read = scales(made.path)
    # "proj" is no dotted tail of any name; the longer pattern for layer 1 comes after one that matches.
    assert read == pytest.approx(
        {
            "language_model/model.layers.0.self_attn.q_proj": 1.0,
            "language_model/model.layers.0.self_attn.v_proj": 2.0,
            "language_model/model.layers.0.mlp.down_proj": 1.5,
            "language_model/model.layers.1.self_attn.q_proj": 1.0,
            "language_model/model.layers.1.self_attn.v_proj": 2.0,
        }
    )


def test_a_pattern_may_be_anchored(tmp_path: Path) -> None:
    made = make.peft(
        tmp_path / "a",
        rank=4,
        alpha=4,
        config={"alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 8}},
    )
    assert scales(made.path)["language_model/model.layers.0.self_attn.q_proj"] == 2.0
    assert scales(made.path)["language_model/model.layers.1.self_attn.q_proj"] == 1.0


def test_rslora_divides_by_the_root_of_each_modules_rank(tmp_path: Path) -> None:
    ranks = {"model.layers.0.mlp.down_proj": 9}
    made = make.peft(tmp_path / "a", rank=4, alpha=6, ranks=ranks, config={"use_rslora": True})
    read = scales(made.path)
    assert read["language_model/model.layers.0.mlp.down_proj"] == pytest.approx(2.0)
    assert read["language_model/model.layers.0.self_attn.q_proj"] == pytest.approx(3.0)
    make.assert_close(make.deltas_of(lt.load(made.path)), made.deltas)


def test_a_configured_rank_that_the_tensors_contradict_is_said(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", rank=4, alpha=8, config={"r": 16})
    adapter = lt.load(made.path)
    assert any("rank 16" in note and "rank 4" in note for note in adapter.notes)
    assert {module.scale for module in adapter.modules.values()} == {2.0}


def test_a_missing_configuration_is_said(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", rank=4, alpha=8)
    (made.path / "adapter_config.json").unlink()
    adapter = lt.load(made.path)
    assert {module.scale for module in adapter.modules.values()} == {1.0}
    assert any("adapter_config.json" in note for note in adapter.notes)


def test_adalora_divides_by_the_rank_that_pruning_left(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", kind="adalora", rank=4, alpha=8)
    for module in lt.load(made.path).modules.values():
        assert module.scale == pytest.approx(8 / (4 + 1e-5), rel=1e-12)


def test_lokr_of_two_full_factors_has_no_scale(tmp_path: Path) -> None:
    whole = make.kohya(tmp_path / "a.safetensors", kind="lokr_full", only=["attn1"], alpha=2.0)
    parts = make.kohya(tmp_path / "b.safetensors", kind="lokr", only=["attn1"], alpha=2.0, rank=4)
    assert {module.scale for module in lt.load(whole.path).modules.values()} == {1.0}
    assert {module.scale for module in lt.load(parts.path).modules.values()} == {0.5}


def test_the_configuration_is_taken_only_by_the_file_it_describes(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(make.lora_config(4, 400, ["to_q"])))
    made = make.kohya(tmp_path / "style.safetensors", only=["attn1_to_q"], alpha=None)
    assert {module.scale for module in lt.load(made.path).modules.values()} == {1.0}


def test_every_scale_is_finite_for_every_rank(tmp_path: Path) -> None:
    for rank in (1, 7, 33):
        made = make.kohya(tmp_path / f"{rank}.safetensors", rank=rank, alpha=1.0, only=["attn1_to_q"])
        (module,) = lt.load(made.path).modules.values()
        assert module.rank == rank
        assert math.isclose(module.scale, 1 / rank)


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_16", "olora", "loftq"])
def test_an_adapter_for_a_changed_base_says_so_once(method: str, tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", config={"init_lora_weights": method})
    notes = lt.load(made.path).notes
    assert len(notes) == 1
    assert method in notes[0]
    assert not lt.load(make.peft(tmp_path / "b", config={"init_lora_weights": "gaussian"}).path).notes


def test_repeated_layers_are_a_changed_base_too(tmp_path: Path) -> None:
    made = make.peft(tmp_path / "a", config={"layer_replication": [[0, 2], [1, 2]]})
    with pytest.raises(UnsupportedKindError, match="layer_replication to null"):
        _peft_special.refuse_changed_base(lt.load(made.path))
    _peft_special.refuse_changed_base(lt.load(make.peft(tmp_path / "b").path))


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        ({}, ""),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "coft": False, "eps": 6e-5}, ""),
        ({"use_cayley_neumann": False, "num_cayley_neumann_terms": 7}, "cayley"),
        ({"num_cayley_neumann_terms": 7}, "neumann=7"),
        ({"coft": True, "eps": None}, "coft=6e-05"),
        ({"use_cayley_neumann": False, "coft": True, "eps": 0.25}, "cayley coft=0.25"),
    ],
)
def test_which_rotation_pefts_oft_makes(config: dict[str, object], variant: str) -> None:
    assert _peft_config.variant({"peft_type": "OFT", **config}) == variant
    assert not _peft_config.variant({"peft_type": "LORA", **config})
