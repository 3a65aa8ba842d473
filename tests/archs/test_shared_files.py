"""Names of real files, and of models whose paths are their own names."""

import json
from pathlib import Path

import pytest

from loratools import archs
from loratools.archs import detect
from loratools.archs._table import DIFFUSERS, NATIVE

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
NAMES = SHARED / "names"
SKELETONS = SHARED / "skeletons"


def read(path):
    if not path.exists():
        pytest.skip(f"{path.name} is not among the shared data here")
    return json.loads(path.read_text())


def stems(skeleton):
    """The stems of a real file's keys, by a rule good enough for these files."""
    found = {}
    for key in skeleton:
        for mark in (".lora_", ".lokr_", ".alpha"):
            if mark in key:
                found[key.partition(mark)[0]] = None
    return found


@pytest.mark.parametrize(
    ("file", "dialect"),
    [
        ("flux_control_lora_format", NATIVE),
        ("flux_lora_diffusers_base_model_format", DIFFUSERS),
        ("flux_lora_diffusers_no_proj_mlp_format", DIFFUSERS),
        ("flux_lora_kohya_with_te1_format", NATIVE),
        ("stripped__peft_adapter_model.safetensors", DIFFUSERS),
    ],
)
def test_real_flux_files_are_detected(file, dialect):
    keys = stems(read(SKELETONS / f"{file}.json"))
    assert keys
    detection = detect(keys, {})
    assert (detection.arch, detection.coverage) == ("flux", 1.0)
    assert {each.dialect for each in detection.resolved.values() if each.component == "denoiser"} == {dialect}


def test_a_real_file_of_what_relatives_share_is_theirs_alike():
    """One block's attention and MLP, whose shapes would tell Flux.2's from Flux.1's; Chroma's are Flux.1's."""
    keys = stems(read(SKELETONS / "flux_lokr_bfl_format.json"))
    assert detect(keys, {}).candidates == ("chroma", "flux", "flux2")
    assert detect(keys, {}, "black-forest-labs/FLUX.1-dev").arch == "flux"


@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("stripped__Juggernaut_XL_v9_unet_diffusion_pytorch_model.fp16.safetensors", "unet."),
        ("stripped__Juggernaut_XL_v9_text_encoder_2_model.fp16.safetensors", "text_encoder_2."),
    ],
)
def test_every_weight_of_a_real_sdxl_checkpoint_is_named(file, prefix):
    keys = [
        key.removesuffix(".weight") for key in read(SKELETONS / f"{file}.json") if key.endswith(".weight")
    ]
    assert len(keys) > 200
    sdxl = archs.get("sdxl")
    assert [key for key in keys if sdxl.resolve(prefix + key) is None] == []


IDENTITY = {
    "llm": [
        "bert",
        "bloom",
        "deepseek_v2",
        "deepseek_v3",
        "distilbert",
        "esm2",
        "falcon",
        "flan_t5",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "mixtral",
        "mpt",
        "opt",
        "phi3",
        "qwen2",
        "qwen2_5_vl",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "roberta",
        "t5",
    ],
    "speech": ["wav2vec2", "wav2vec2_mms"],
    "vision": ["vit", "clip"],
}


@pytest.mark.parametrize(
    ("arch", "model"), [(arch, model) for arch, models in IDENTITY.items() for model in models]
)
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_models_without_a_table_are_detected_by_their_markers(arch, model, prefix):
    components = read(NAMES / f"{model}.json")["components"]
    paths = {
        entry["native"] for part in components.values() for entry in part["modules"] if entry.get("native")
    }
    assert paths
    detection = detect(dict.fromkeys(prefix + path for path in paths), {})
    assert detection.arch == arch
    assert {each.path for each in detection.resolved.values()} == paths


def test_whisper_is_told_from_bart_by_the_base_models_name():
    modules = read(NAMES / "whisper.json")["components"]
    paths = [entry["native"] for part in modules.values() for entry in part["modules"]]
    attention = dict.fromkeys(
        f"base_model.model.{path}" for path in paths if path.endswith(("q_proj", "v_proj"))
    )
    assert detect(attention, {}, "openai/whisper-base").arch == "speech"
    assert detect(attention, {}, "facebook/bart-base").arch == "llm"
    assert detect(attention, {}).arch == "llm"
