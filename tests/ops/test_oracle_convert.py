"""Conversions against what diffusers' own converters made of the same files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loratools.errors import LoraError
from loratools.model import Adapter
from loratools.ops import _probe, files
from loratools.ops.convert import convert_file

ORACLE = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracle"
pytestmark = pytest.mark.skipif(not ORACLE.is_dir(), reason="the reference results are not there")

# The cases' widths are tiny, and some tell nothing of the architecture by name alone.
ARCHS = {
    "anima_native": "anima",
    "flux2_kohya": "flux2",
    "flux2_lokr_lycoris": "flux2",
    "flux2_peft": "flux2",
    "flux3_native": "flux3",
    "flux_ai_toolkit": "flux",
    "flux_kohya_sparse_qkv": "flux",
    "flux_kohya_te_extra": "flux",
    "flux_thelastben_alpha": "flux",
    "flux_alpha_int_raises": "flux",
    "hidream_native": "hidream",
    "hunyuan_video_native": "hunyuan_video",
    "hunyuan_video_transformer_prefix": "hunyuan_video",
    "ideogram4_ai_toolkit": "ideogram4",
    "lumina2_native": "lumina2",
    "qwen_bare_alpha": "qwen_image",
    "qwen_default_infix": "qwen_image",
    "qwen_kohya": "qwen_image",
    "wan_ai_toolkit": "wan",
    "wan_comfy_diffb": "wan",
    "wan_full_diff": "wan",
    "wan_musubi": "wan",
    "zimage_kohya": "z_image",
    "zimage_kohya_fused_qkv": "z_image",
    "zimage_lokr": "z_image",
}

# What the oracle's tiny models have that no real one does, or diffusers' converter gets wrong, left out of comparing.
APART = {
    # The converter renames the final layer's modulation, but does not exchange its halves as the checkpoint's does.
    "flux2_peft": ("final_layer.adaLN_modulation.1",),
    # 3 x 3072 rows of q, k and v, which the converter counts on, beside an MLP of a few rows; and an embedder that is
    # called img_in.proj in the checkpoint and x_embedder.proj in diffusers.
    "hunyuan_video_native": ("linear1", "img_in"),
    "hunyuan_video_transformer_prefix": ("linear1", "img_in"),
}

# Where diffusers' result is wrong, or spelt by its own conventions, and how.
LOSES = {
    "flux_kohya_te_extra": "embedders and the final layer come out without their prefix and are not loaded",
    "wan_comfy_diffb": "differences of norms are left out",
    "wan_full_diff": "full differences are left out",
}


def manifest(case: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((ORACLE / case / "manifest.json").read_text())
    return found


def lora_of(case: str) -> Path:
    inputs = manifest(case)["inputs"]
    assert isinstance(inputs, dict)
    return ORACLE / case / str(inputs["lora"]["path"])


def keys(path: Path) -> set[str]:
    return {key for key in files.load(path).order if not key.endswith((".alpha", "alpha"))}


def without(adapter: Adapter, parts: tuple[str, ...]) -> Adapter:
    """The adapter without the modules that have one of these in their path."""
    kept = {
        target: module
        for target, module in adapter.modules.items()
        if not any(part in target.path for part in (*parts, "x_embedder" if "img_in" in parts else "(none)"))
    }
    return replace(adapter, modules=kept)


def distance(one: Adapter, other: Adapter, arch: str) -> tuple[float, str]:
    found = _probe.compare(arch, one.modules.values(), other.modules.values(), {})
    return found.error, found.worst


@pytest.mark.parametrize(
    "case", [case for case in ARCHS if case not in LOSES and not case.endswith("raises")]
)
def test_as_diffusers_converts_it(case: str, tmp_path: Path) -> None:
    arch, source = ARCHS[case], lora_of(f"conv__{case}")
    apart = APART.get(case, ())
    drop = ("lora", "unnamed") if "img_in" in apart else ()
    report = convert_file(source, tmp_path / "ours.safetensors", to="diffusers", arch=arch, drop=drop)
    assert all(any(part in key for part in apart) for key in report.dropped)
    expected_path = ORACLE / f"conv__{case}" / "expected" / "converted.safetensors"
    ours = files.load(tmp_path / "ours.safetensors", arch=arch)
    expected = files.load(expected_path, arch=arch)
    if case == "flux_thelastben_alpha":
        # diffusers returns the alphas apart from the tensors.
        expected = files.load(source, arch=arch)
    error, worst = distance(without(expected, apart), without(ours, apart), arch)
    assert error <= 1e-6, worst
    missing = keys(expected_path) - keys(tmp_path / "ours.safetensors")
    more = keys(tmp_path / "ours.safetensors") - keys(expected_path)
    # A name that is none of the architecture's stays as it was.
    assert all(any(part in key for part in apart) for key in more)
    assert all(
        key.startswith(("transformer.single_transformer_blocks", "transformer.x_emb")) for key in missing
    )
    assert not missing or drop


@pytest.mark.parametrize("case", LOSES)
def test_what_diffusers_loses_is_carried_or_refused_by_name(case: str, tmp_path: Path) -> None:
    arch, source = ARCHS[case], lora_of(f"conv__{case}")
    before = files.load(source, arch=arch)
    report = convert_file(source, tmp_path / "comfy.safetensors", to="comfy", arch=arch)
    assert not report.dropped
    assert {entry.key for entry in report.ledger} == set(before.order)
    assert report.error is not None
    assert report.error <= 1e-6


def test_a_full_difference_is_not_left_out_in_silence(tmp_path: Path) -> None:
    source = lora_of("conv__wan_full_diff")
    with pytest.raises(LoraError, match="diff") as refused:
        convert_file(source, tmp_path / "x.safetensors", to="diffusers", arch="wan")
    assert any(key.endswith(".diff") for key in refused.value.keys)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("case", ["conv__flux_alpha_int_raises"])
def test_what_diffusers_cannot_read(case: str, tmp_path: Path) -> None:
    arch = ARCHS[case.removeprefix("conv__")]
    report = convert_file(lora_of(case), tmp_path / "x.safetensors", to="diffusers", arch=arch)
    assert report.weights
    before, after = files.load(lora_of(case), arch=arch), files.load(report.output, arch=arch)
    assert distance(before, after, arch)[0] <= 1e-6


def test_hadamard_factors_go_where_they_can_be_held(tmp_path: Path) -> None:
    source = lora_of("conv__sd15_hada_raises")
    report = convert_file(source, tmp_path / "x.safetensors", to="lycoris", arch="sd15")
    assert report.kinds == {"loha": report.modules[1]}
    with pytest.raises(LoraError, match="--as lora"):
        convert_file(source, tmp_path / "y.safetensors", to="attn-procs", arch="sd15")
    turned = convert_file(source, tmp_path / "y.safetensors", to="diffusers", arch="sd15", as_kind="lora")
    assert turned.kinds == {"lora": turned.modules[1]}
    assert all(each.exact for each in turned.conversions)


CARRIED = {
    "diffusers_flux__full": "flux",
    "diffusers_sd3__full": "sd3",
    "diffusers_old__attn_procs_old": "sd15",
    "diffusers_sd15__attn_meta_alpha": "sd15",
    "diffusers_sd15__attn_new": "sd15",
    "diffusers_sd15__mixed_keys": "sd15",
    "diffusers_sd15__rank_pattern_no_meta": "sd15",
    "diffusers_sd15__rslora": "sd15",
    "kohya__sd15_attn": "sd15",
    "kohya__sdxl_sgm_attn": "sdxl",
    "kohya__sdxl_uniform": "sdxl",
    "kohya__sdxl_sgm_full_locon": "sdxl",
    "tokohya__flux__full": "flux",
    "tokohya__sd15__dora": "sd15",
    "tokohya__sdxl__full": "sdxl",
}


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "comfy"])
@pytest.mark.parametrize("case", CARRIED)
def test_every_case_keeps_its_delta(case: str, layout: str, tmp_path: Path) -> None:
    arch = CARRIED[case]
    source = lora_of(case)
    # The oracle's tiny SDXL has one layer a block: some of its numbers are those of no weight of the real one.
    strangers = case.startswith("kohya__sdxl") and layout != "kohya"
    drop = ("unnamed",) if strangers else ()
    report = convert_file(source, tmp_path / "x.safetensors", to=layout, arch=arch, drop=drop)
    assert bool(report.dropped) == strangers
    assert report.error is not None
    assert report.error <= 1e-6
    # And no key that diffusers' own writer mangles: one prefix, one separator, one suffix each.
    again = files.load(report.output, arch=arch)
    assert again.arch == arch
    assert not again.extras


def test_no_case_is_left_out() -> None:
    families = ("conv__", "tokohya__", "diffusers_", "kohya__")
    cases = {path.name for path in ORACLE.iterdir() if path.name.startswith(families)}
    assert cases == {f"conv__{name}" for name in ARCHS} | set(CARRIED) | {"conv__sd15_hada_raises"}
