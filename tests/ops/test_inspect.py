"""What `info` says, against numpy on dense ΔW."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

import factories as make
import numpy as np
import pytest
import torch

import loratools as lt
from loratools.errors import LoraError, MissingFileError
from loratools.ops import inspect


def figures(dense: np.ndarray) -> dict[str, float]:
    sigma = np.linalg.svd(dense.reshape(dense.shape[0], -1), compute_uv=False)
    share = sigma**2 / (sigma**2).sum()
    share = share[share > 1e-20]
    return {
        "norm": math.sqrt((sigma**2).sum()),
        "spectral_norm": sigma[0],
        "stable_rank": (sigma**2).sum() / sigma[0] ** 2,
        "effective_rank": math.exp(-(share * np.log(share)).sum()),
    }


@pytest.mark.parametrize(
    ("maker", "rtol"),
    [
        (lambda to: make.kohya(to / "a.safetensors", "sdxl", mid=True, alpha=-3.0), 1e-5),
        (lambda to: make.kohya(to / "a.safetensors", "sd15", dtype=torch.float16, rank=6), 2e-4),
        (lambda to: make.diffusers(to / "a.safetensors", "flux", dtype=torch.bfloat16), 2e-4),
        (lambda to: make.peft(to / "a", embedding=True, config={"use_rslora": True}), 1e-5),
    ],
    ids=["kohya-mid", "kohya-f16", "flux-bf16", "peft"],
)
def test_norms_and_spectra_are_those_of_the_dense_delta(maker, rtol: float, tmp_path: Path) -> None:
    made = maker(tmp_path)
    found = lt.info(made.path)
    assert len(found.modules) == len(made.deltas)
    for module in found.modules:
        dense = made.deltas[make.key_of(module.component, module.target)]
        for name, want in figures(dense).items():
            assert getattr(module, name) == pytest.approx(want, rel=rtol), (module.target, name)
        assert module.shape == dense.shape
        sigma = np.linalg.svd(dense.reshape(dense.shape[0], -1), compute_uv=False)
        for rank, kept in (module.energy or {}).items():
            assert rank < (module.rank or 0)
            assert kept == pytest.approx((sigma[:rank] ** 2).sum() / (sigma**2).sum(), abs=max(rtol, 1e-6))


def test_components_sum_up_their_modules(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", ranks={"attn2": 2})
    found = lt.info(made.path)
    assert set(found.components) == {"denoiser", "text_encoder", "text_encoder_2"}
    for name, component in found.components.items():
        dense = [delta for key, delta in made.deltas.items() if key.startswith(name + "/")]
        norms = [figures(delta) for delta in dense]
        assert component.modules == len(dense)
        assert component.norm == pytest.approx(math.sqrt(sum(each["norm"] ** 2 for each in norms)), rel=1e-5)
        assert component.spectral_norm == pytest.approx(
            max(each["spectral_norm"] for each in norms), rel=1e-5
        )
        assert component.stable_rank == pytest.approx(median(each["stable_rank"] for each in norms), rel=1e-5)
        sigmas = [np.linalg.svd(d.reshape(d.shape[0], -1), compute_uv=False) for d in dense]
        whole = sum((sigma**2).sum() for sigma in sigmas)
        for rank, kept in (component.energy or {}).items():
            assert kept == pytest.approx(sum((sigma[:rank] ** 2).sum() for sigma in sigmas) / whole, rel=1e-5)
    assert found.components["denoiser"].ranks == {2: 2, 4: 4}
    assert sum(found.components["denoiser"].ranks.values()) == found.components["denoiser"].modules


def test_a_module_of_zeros_has_zero_norms(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15")
    zeros = {key: tensor * 0 if "lora_up" in key else tensor for key, tensor in made.tensors.items()}
    make.write_safetensors(made.path, zeros, None)
    for module in lt.info(made.path).modules:
        assert (module.norm, module.spectral_norm, module.stable_rank) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_dora_has_no_norm_of_its_own_and_its_axis_is_said(axis: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", dora=axis)
    for module in lt.info(made.path).modules:
        assert module.dora
        assert module.magnitude_axis == axis
        assert (module.norm, module.spectral_norm, module.energy) == (None, None, None)


def test_other_kinds_have_ranks_but_no_norms(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", kind="loha", rank=3)
    found = lt.info(made.path)
    assert found.kinds == {"loha": len(make.SD15)}
    assert {(module.rank, module.norm) for module in found.modules} == {(3, None)}


def test_headers_only(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    found = lt.info(made.path, norms=False)
    assert {module.norm for module in found.modules} == {None}
    assert found.components["denoiser"].norm is None
    assert found.components["denoiser"].modules == 6


def test_the_files_facts(tmp_path: Path) -> None:
    made = make.kohya(
        tmp_path / "a.safetensors",
        "sdxl",
        dtype=torch.float16,
        extra={"strange": torch.ones(2)},
        metadata={
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_output_name": "ink",
            "ss_training_started_at": "1700000000.5",
            "ss_steps": "1200",
            "ss_tag_frequency": json.dumps({"a": {"ink": 3, "wash": 1}, "b": {"ink": 2}}),
            "ss_network_dim": "64",
        },
    )
    found = lt.info(made.path)
    assert found.bytes == made.path.stat().st_size
    assert (found.type, found.layout, found.arch, found.container) == (
        "adapter",
        "kohya",
        "sdxl",
        "safetensors",
    )
    assert found.arch_title == "Stable Diffusion XL"
    assert found.tensors == len(made.tensors)
    assert found.unclaimed == ("strange",)
    assert found.dtypes == {"F16": len(made.tensors) - 1, "F32": 1}
    assert found.training["title"] == "ink"
    assert found.training["tags"] == {"ink": 5, "wash": 1}
    assert found.training["date"].startswith("2023-11-14 22:13:20")
    assert found.training["base model"] == "sdxl_base_v1-0"
    assert any("rank 64" in warning and "4" in warning for warning in found.warnings)
    assert {module.alpha for module in found.modules} == {2.0}
    assert {module.scale for module in found.modules} == {0.5}
    assert {module.dtype for module in found.modules} == {"F16"}


def test_what_is_no_adapter_is_described(tmp_path: Path) -> None:
    make.write_safetensors(tmp_path / "lora.safetensors", {"<style>": torch.ones(768)}, None)
    found = lt.info(tmp_path / "lora.safetensors")
    assert (found.type, found.modules, found.tensors) == ("textual-inversion", (), 1)
    assert found.unclaimed == ("<style>",)


def test_candidates_of_a_folder_are_its_visible_weight_files(tmp_path: Path) -> None:
    make.kohya(tmp_path / "b.safetensors", "sdxl")
    make.peft(tmp_path / "a")
    (tmp_path / "c.safetensors").write_bytes(b"not a file of tensors")
    (tmp_path / ".hidden").mkdir()
    make.kohya(tmp_path / ".hidden" / "d.safetensors")
    (tmp_path / "readme.txt").write_text("x")
    found = list(inspect.candidates(str(tmp_path)))
    assert [Path(path).name for path in found] == [
        "b.safetensors",
        "c.safetensors",
        "adapter_model.safetensors",
    ]


def test_a_file_named_outright_that_cannot_be_read_raises(tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(LoraError, match=r"c\.safetensors"):
        lt.info(tmp_path / "c.safetensors")


def test_model_folders_are_checkpoints(tmp_path: Path) -> None:
    diffusers, sharded = tmp_path / "d", tmp_path / "s"
    diffusers.mkdir()
    sharded.mkdir()
    (diffusers / "model_index.json").write_text("{}")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1", "b": "2"}}))
    assert (lt.info(diffusers).type, lt.info(diffusers).layout) == ("checkpoint", "diffusers")
    assert (lt.info(sharded).layout, lt.info(sharded).tensors) == ("sharded", 2)
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(LoraError, match="index"):
        lt.info(sharded)


def test_a_folder_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        lt.info(tmp_path)


@pytest.mark.parametrize("stated", ["nonsense", "1e400", "-1e30", "nan"])
def test_odd_metadata_breaks_nothing(stated: str, tmp_path: Path) -> None:
    metadata = {
        "ss_training_started_at": stated,
        "ss_tag_frequency": stated,
        "ss_network_dim": stated,
        "software": stated,
        "ss_network_args": stated,
    }
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", metadata=metadata)
    assert lt.info(made.path, norms=False).metadata == metadata


def test_nan_factors_are_reported_as_such_and_not_hidden(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    name = next(key for key in made.tensors if "lora_up" in key)
    made.tensors[name].view(-1)[0] = float("nan")
    make.write_safetensors(made.path, made.tensors, None)
    found = lt.info(made.path)
    bad = [module for module in found.modules if module.norm is not None and math.isnan(module.norm)]
    assert len(bad) == 1
    assert any("NaN" in warning for warning in found.warnings)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norms", [True, False])
def test_an_alpha_that_is_not_finite_is_one_fault(value: float, norms: bool, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl")
    name = next(key for key in made.tensors if key.endswith(".alpha"))
    made.tensors[name].fill_(value)
    make.write_safetensors(made.path, made.tensors, None)
    (said,) = lt.info(made.path, norms=norms).warnings
    assert said.startswith("1 of 9 modules state an alpha")
    assert name in said


def warned(found: lt.Info, word: str) -> list[str]:
    return [warning for warning in found.warnings if word in warning]


@pytest.mark.parametrize(
    ("dim", "alpha", "times"),
    [
        ("8", "2.0", "2"),
        ("2", "2", "0.5"),
        ("4", "2", None),
        ("8", "1", None),
        ("None", "2", None),
        ("8", "nan", None),
    ],
)
def test_an_alpha_that_was_left_as_it_was_when_the_rank_changed_is_told_with_both_scales(
    dim: str, alpha: str, times: str | None, tmp_path: Path
) -> None:
    """The modules have rank 4 and alpha 2."""
    metadata = {"ss_network_dim": dim, "ss_network_alpha": alpha}
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", metadata=metadata)
    said = warned(lt.info(made.path, norms=False), "the strength is")
    assert len(said) == (times is not None)
    if times is not None:
        trained = float(alpha) / float(dim)
        assert (
            f"a scale of 0.5; they were trained with rank {dim} and alpha 2, a scale of {trained:g}"
            in said[0]
        )
        assert f"the strength is {times} times what was trained" in said[0]


def test_a_stale_alpha_of_float16_is_still_the_one_that_was_stated(tmp_path: Path) -> None:
    metadata = {"ss_network_dim": "8", "ss_network_alpha": "0.1"}
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", alpha=0.1, dtype=torch.float16, metadata=metadata)
    assert lt.info(made.path, norms=False).modules[0].alpha != 0.1
    assert warned(lt.info(made.path, norms=False), "the strength is 2 times")


def test_ranks_that_the_training_chose_are_no_change_of_rank(tmp_path: Path) -> None:
    """Kernels have conv_dim, blocks block_dims, and the same alpha."""
    metadata = {"ss_network_dim": "8", "ss_network_alpha": "2", "ss_network_args": '{"conv_dim": "4"}'}
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", rank=8, ranks={"in_layers": 4}, metadata=metadata)
    assert {module.rank for module in lt.info(made.path, norms=False).modules} == {4, 8}
    assert not warned(lt.info(made.path, norms=False), "the strength is")
    metadata["ss_network_args"] = '{"block_dims": "4,8,8"}'
    made = make.kohya(tmp_path / "b.safetensors", "sdxl", rank=8, ranks={"attn": 4}, metadata=metadata)
    assert not warned(lt.info(made.path, norms=False), "the strength is")


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (0.0, "alpha of 0"),
        (-1.0, "alpha below 0"),
        (math.inf, "infinite"),
        (math.nan, "not a number"),
        (2.0, None),
    ],
)
def test_alphas_that_make_no_sense_are_mentioned_once(
    alpha: float, words: str | None, tmp_path: Path
) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", alphas={"attn1": alpha})
    said = warned(lt.info(made.path, norms=False), "state an alpha")
    assert len(said) == (words is not None)
    if words is not None:
        assert words in said[0]
        assert "1 of 9 modules" in said[0]
        assert "attn1" in said[0]


def split_qkv(path: Path, alpha: float, *, full: bool = False) -> Path:
    """A fused qkv whose parts of rank 2 lie side by side, as sd-scripts' ``split_qkv`` saves them."""
    up = torch.ones(24, 6) if full else torch.block_diag(*(torch.ones(8, 2) for _ in range(3)))
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    factors = {"lora_up": up, "lora_down": torch.ones(6, 8)}
    tensors = {f"{stem}.{role}.weight": tensor for role, tensor in factors.items()}
    tensors |= {f"{stem}.alpha": torch.tensor(alpha)}
    make.write_safetensors(path, tensors, {"ss_base_model_version": "flux1"})
    return path


def test_parts_that_were_trained_apart_under_one_part_s_alpha_are_noted(tmp_path: Path) -> None:
    file = split_qkv(tmp_path / "a.safetensors", 2.0)
    found = lt.info(file)
    assert found.arch == "flux"
    said = warned(found, "side by side")
    assert len(said) == 1
    assert "parts of rank 2" in said[0]
    assert "1/3 of what was trained" in said[0]
    assert not warned(lt.info(file, norms=False), "side by side")


@pytest.mark.parametrize(("alpha", "full"), [(6.0, False), (3.0, False), (2.0, True)])
def test_other_fused_modules_leave_nothing_open(alpha: float, full: bool, tmp_path: Path) -> None:
    found = lt.info(split_qkv(tmp_path / "a.safetensors", alpha, full=full))
    assert found.arch == "flux"
    assert not warned(found, "side by side")


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        ({"q_proj": 4, "layers.0.self_attn.q_proj": 16}, 1),
        ({"q_proj": 4, ".*attn.q_proj": 16}, 2),
        ({r"^model\.layers\.1\.self_attn\.q_proj": 4, r".*\.1\..*": 16}, 1),
        ({"q_proj": 4, ".*q_proj": 4, "v_proj": 16}, 0),
        ({"q_proj": 4, "(": 16, "attn.q": 16}, 0),
        ({r"^layers\.0\.self_attn\.q_proj": 4, "q_proj": 16}, 0),
    ],
)
def test_patterns_that_disagree_on_a_module_are_told(
    patterns: dict[str, int], count: int, tmp_path: Path
) -> None:
    made = make.peft(tmp_path / "a", config={"alpha_pattern": patterns})
    said = warned(lt.info(made.path, norms=False), "is ambiguous")
    assert len(said) == bool(count)
    if count:
        assert f"alpha_pattern is ambiguous for {count} of {len(make.LLAMA)} modules" in said[0]
        assert "says 4" in said[0]
        assert "says 16" in said[0]


def test_an_ambiguous_pattern_does_change_the_scale_with_its_order(tmp_path: Path) -> None:
    """What the note warns of: the same patterns in another order."""
    rules = {"q_proj": 4, "layers.0.self_attn.q_proj": 16}
    scales = []
    for name, items in (("a", rules), ("b", dict(reversed(rules.items())))):
        made = make.peft(tmp_path / name, config={"alpha_pattern": items})
        assert warned(lt.info(made.path, norms=False), "is ambiguous")
        scales.append([module.scale for module in lt.info(made.path, norms=False).modules])
    assert scales[0] != scales[1]
