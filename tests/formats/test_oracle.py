"""Reference results of other tools: the ΔW read from a file is what the right bake added to the base."""

from __future__ import annotations

import json
import re
from pathlib import Path

import factories as make
import numpy as np
import pytest
from safetensors.numpy import load_file

import loratools as lt

ORACLE = Path(__file__).resolve().parents[2] / ".." / "shared" / "oracle"
pytestmark = pytest.mark.skipif(
    not ORACLE.is_dir(), reason="the reference results are not beside the repository"
)

KOHYA = {
    "kohya__sd15_attn": 60,
    "kohya__sdxl_sgm_attn": 113,
    "kohya__sdxl_sgm_full_locon": 150,
    "kohya__sdxl_uniform": 113,
}
KEY_FORMS = [
    "canonical",
    "with_adapter_name",
    "custom_adapter_name",
    "no_prefix",
    "double_prefix",
    "fsdp_prefix",
    "orig_mod_prefix",
]

# The reference's tiny UNets have two levels and one resnet in each, so CompVis counts their blocks otherwise.
_TINY_BLOCKS = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0": "down_blocks.0.resnets.0",
    "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_3_0": "down_blocks.1.resnets.0",
    "input_blocks_3_1": "down_blocks.1.attentions.0",
    "middle_block_0": "mid_block.resnets.0",
    "middle_block_1": "mid_block.attentions.0",
    "middle_block_2": "mid_block.resnets.1",
    "output_blocks_0_0": "up_blocks.0.resnets.0",
    "output_blocks_0_1": "up_blocks.0.attentions.0",
    "output_blocks_1_0": "up_blocks.0.resnets.1",
    "output_blocks_1_1": "up_blocks.0.attentions.1",
    "output_blocks_1_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_2_0": "up_blocks.1.resnets.0",
    "output_blocks_3_0": "up_blocks.1.resnets.1",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}
_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


def _flat(key: str) -> str:
    return key.removesuffix(".weight").replace("text_model.", "").replace(".", "_")


def _in_base(stem: str) -> str:
    """The flattened name, in the reference base, of a Kohya stem or of a dotted diffusers one."""
    for prefix, folder in (
        ("lora_te1_", "text_encoder_"),
        ("lora_te2_", "text_encoder_2_"),
        ("lora_te_", "text_encoder_"),
    ):
        if stem.startswith(prefix):
            return folder + stem.removeprefix(prefix).replace("text_model_", "")
    if not stem.startswith("lora_unet_"):
        return _flat(stem)
    name = stem.removeprefix("lora_unet_")
    for native in sorted(_TINY_BLOCKS, key=len, reverse=True):
        if name == native or name.startswith(native + "_"):
            rest = name.removeprefix(native).lstrip("_")
            dotted = f"{_TINY_BLOCKS[native]}.{_RESNET.get(rest, rest)}".rstrip(".")
            return "unet_" + dotted.replace(".", "_")
    return "unet_" + name


def _stems(adapter: lt.Adapter) -> dict[str, np.ndarray]:
    """ΔW by the stem of the module's own keys."""
    found = {}
    for module in adapter.modules.values():
        stem = re.split(
            r"\.lora_(?:down|up|A|B|linear)|\.lora\.|(?<=to_[qkv])_lora\.|(?<=to_out)_lora\.",
            module.factors["up"].name,
        )[0]
        found[stem] = module.delta().double().numpy()
    return found


def _changes(case: Path, expected: str) -> dict[str, np.ndarray]:
    base = load_file(case / "input" / "base.safetensors")
    fused = load_file(case / "expected" / expected)
    return {
        _flat(key): fused[key].astype(np.float64) - base[key]
        for key in base
        if (fused[key] != base[key]).any()
    }


def _assert_added(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], case: Path) -> None:
    compare = json.loads((case / "manifest.json").read_text("utf-8"))["compare"]
    assert set(found) == set(expected)
    for key, want in expected.items():
        np.testing.assert_allclose(found[key], want, rtol=compare["rtol"], atol=compare["atol"], err_msg=key)


@pytest.mark.parametrize("name", KOHYA)
def test_kohya_files_add_what_a_right_bake_adds(name: str) -> None:
    case = ORACLE / name
    adapter = lt.load(case / "input" / "lora.safetensors")
    assert adapter.layout.name == "kohya"
    assert adapter.arch == ("sd15" if "sd15" in name else "sdxl")
    assert len(adapter.modules) == KOHYA[name]
    found = {_in_base(stem): delta for stem, delta in _stems(adapter).items()}
    _assert_added(found, _changes(case, "fused_true.safetensors"), case)


DIFFUSERS = {
    "diffusers_flux__full": ("fused", "flux", ""),
    "diffusers_old__attn_procs_old": ("fused_true", "sd15", "attn-procs"),
    "diffusers_sd15__attn_meta_alpha": ("fused", "sd15", "lora-updown"),
    "diffusers_sd15__attn_new": ("fused", "sd15", "lora-updown"),
    "diffusers_sd15__mixed_keys": ("fused", "sd15", ""),
    "diffusers_sd15__rank_pattern_no_meta": ("fused", "sd15", "peft-keys"),
    "diffusers_sd15__rslora": ("fused", "sd15", "peft-keys"),
    "diffusers_sd3__full": ("fused", "", "peft-keys"),
}


def _cleaned(stem: str) -> str:
    stem = stem.replace(".processor.", ".")
    stem = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", stem)
    return re.sub(r"\.to_out$", ".to_out.0", stem)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_files_add_what_diffusers_fused(name: str) -> None:
    case = ORACLE / name
    expected, _, variant = DIFFUSERS[name]
    adapter = lt.load(case / "input" / "pytorch_lora_weights.safetensors")
    assert adapter.layout.name == "diffusers"
    assert variant in ("", adapter.layout.variant)
    assert not adapter.extras
    found = {_in_base(_cleaned(stem)): delta for stem, delta in _stems(adapter).items()}
    _assert_added(found, _changes(case, expected + ".safetensors"), case)


def test_every_case_of_these_families_is_checked() -> None:
    found = {path.name for path in ORACLE.iterdir() if path.name.startswith(("kohya__", "diffusers_"))}
    assert found == {*KOHYA, *DIFFUSERS}


def test_stable_diffusion_3_is_not_taken_for_another_architecture() -> None:
    """Flux names many of its weights alike; a file that it does not explain whole is not one of its own."""
    adapter = lt.load(ORACLE / "diffusers_sd3__full" / "input" / "pytorch_lora_weights.safetensors")
    assert adapter.arch in ("sd3", "unknown")


@pytest.mark.parametrize(
    "name", ["diffusers_sd15__attn_new", "diffusers_old__attn_procs_old", "diffusers_flux__full"]
)
def test_architectures_of_tiny_models_are_told_by_names(name: str) -> None:
    adapter = lt.load(ORACLE / name / "input" / "pytorch_lora_weights.safetensors")
    # Names fit Stable Diffusion 1 and 2 alike, and a tiny model's widths tell neither.
    assert adapter.arch in (DIFFUSERS[name][1], "unknown")


@pytest.mark.parametrize("form", KEY_FORMS)
def test_every_spelling_of_pefts_keys_is_the_same_table(form: str) -> None:
    case = ORACLE / "peft_inspect__key_forms"
    adapter = lt.load(case / "input" / form)
    table = load_file(case / "expected" / "table.safetensors")
    found = {}
    for target, module in adapter.modules.items():
        found[f"{target.path}.lora_A.weight"] = module.factors["down"].numpy()
        found[f"{target.path}.lora_B.weight"] = module.factors["up"].numpy()
        assert target.component == "language_model"
    assert set(found) == set(table)
    for key, want in table.items():
        np.testing.assert_array_equal(found[key], want)


def test_transformers_own_writer_is_the_same_layout() -> None:
    adapter = lt.load(ORACLE / "peft_inspect__key_forms" / "input" / "transformers_native")
    assert adapter.layout.name == "peft"
    assert {target.path for target in adapter.modules} == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"
    }


@pytest.mark.parametrize("name", KOHYA)
def test_reference_files_are_written_back(name: str, tmp_path: Path) -> None:
    path = ORACLE / name / "input" / "lora.safetensors"
    lt.save(lt.load(path), tmp_path / "b.safetensors")
    assert make.read_safetensors(tmp_path / "b.safetensors") == make.read_safetensors(path)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_pefts_other_kinds_have_the_scale_that_peft_gives_them(kind: str) -> None:
    """Their configuration calls it ``alpha``, not ``lora_alpha``."""
    case = ORACLE / f"peft_tolora__{kind}"
    adapter = lt.load(case / "input" / "adapter")
    assert adapter.kinds == {kind: 6}
    assert {(module.alpha, module.scale) for module in adapter.modules.values()} == {(4.0, 2.0)}
    compare = json.loads((case / "manifest.json").read_text("utf-8"))["compare"]
    truth = load_file(case / "expected" / "delta.safetensors")
    assert {target.path for target in adapter.modules} == set(truth)
    for target, module in adapter.modules.items():
        np.testing.assert_allclose(
            module.delta().numpy(), truth[target.path], rtol=compare["rtol"], atol=compare["atol"]
        )
