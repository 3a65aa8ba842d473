"""The tables against names obtained by running other implementations, and against layouts of real files."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from loratools import archs
from loratools.archs import detect
from loratools.archs._table import DIFFUSERS, NATIVE
from loratools.model import Rows

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
NAMES = SHARED / "names"
SKELETONS = SHARED / "skeletons"

COMPONENTS = {
    "sd15": ("sd15", {"unet": "denoiser", "te": "text_encoder"}),
    "sd21": ("sd2", {"unet": "denoiser", "te": "text_encoder"}),
    "sdxl": ("sdxl", {"unet": "denoiser", "te1": "text_encoder", "te2": "text_encoder_2"}),
    "flux_dev": (
        "flux",
        {"transformer": "denoiser", "te1_clip_l": "text_encoder", "te_t5xxl": "text_encoder_2"},
    ),
}
LAYOUTS = {
    "sd15": "sd15",
    "sd15_locon": "sd15",
    "sd21": "sd2",
    "sd21_locon": "sd2",
    "sdxl": "sdxl",
    "sdxl_locon": "sdxl",
    "flux1": "flux",
    "flux_kontext": "flux",
}


def read(path):
    if not path.exists():
        pytest.skip(f"{path.name} is not among the shared data here")
    return json.loads(path.read_text())


def intervals(rows):
    """Rows as fractions of the whole weight."""
    if rows is None:
        return None
    return [(Fraction(start, rows.of), Fraction(stop, rows.of)) for start, stop in rows.spans]


def expected(entry):
    if entry["swap"]:
        return intervals(Rows(((1, 2), (0, 1)), of=2))
    if entry["rows"] is None:
        return None
    start, stop, total = entry["rows"]
    return [(Fraction(start, total), Fraction(stop, total))]


def native(entry):
    # A fused attention's weight is a bare parameter in the checkpoint.
    return entry["native"].removesuffix("_weight")


@pytest.mark.parametrize("table", COMPONENTS)
def test_every_module_agrees(table):
    name, components = COMPONENTS[table]
    arch = archs.get(name)
    data = read(NAMES / f"{table}.json")["components"]
    checked = 0
    for part, component in components.items():
        prefixes = data[part]["prefixes"]
        for entry in data[part]["modules"]:
            found = arch.resolve(prefixes["diffusers"] + entry["diffusers"])
            assert (found.component, found.path) == (component, native(entry))
            assert intervals(found.rows) == expected(entry)
            assert arch.spell(component, found.path, found.rows, DIFFUSERS) == entry["diffusers"]
            assert arch.spell(component, found.path, None, NATIVE) == native(entry)
            whole = arch.resolve(prefixes["native"] + native(entry))
            assert (whole.component, whole.path, whole.rows) == (component, native(entry), None)
            kohya = arch.resolve(entry["kohya"])
            assert (kohya.component, kohya.path) == (component, native(entry))
            dialect = arch.component(component).kohya_dialect
            rows = found.rows if dialect == DIFFUSERS else None
            spelt = arch.spell(component, found.path, rows, dialect, "_")
            assert arch.component(component).prefix("kohya") + spelt == entry["kohya"]
            checked += 1
    assert checked > 300


@pytest.mark.parametrize("table", COMPONENTS)
def test_every_prefix_of_the_data_is_known(table):
    name, components = COMPONENTS[table]
    arch = archs.get(name)
    data = read(NAMES / f"{table}.json")["components"]
    for part, component in components.items():
        entry = data[part]["modules"][0]
        for layout, prefix in data[part]["prefixes"].items():
            # One encoder of several cannot be told by a prefix that all components share.
            if "(" in prefix or (layout == "peft" and component == "text_encoder_2"):
                continue
            for body in (native(entry), entry["diffusers"]):
                assert arch.resolve(prefix + body).component == component


@pytest.mark.parametrize("table", COMPONENTS)
def test_every_other_parameter_agrees(table):
    name, components = COMPONENTS[table]
    arch = archs.get(name)
    data = read(NAMES / f"{table}.json")["components"]
    for part, component in components.items():
        for entry in data[part].get("others", ()):
            if entry["native"].endswith((".bias", "_bias")):
                continue
            path, twin = (
                entry[side].removesuffix(".weight").removesuffix(".scale") for side in ("native", "diffusers")
            )
            found = arch.resolve(data[part]["prefixes"]["diffusers"] + twin)
            assert (found.component, found.path, found.rows) == (component, path, None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_module_of_a_trainers_network_resolves_to_a_weight_of_its_own(layout):
    modules = read(NAMES / "kohya_layouts.json")[layout]
    arch = archs.get(LAYOUTS[layout])
    found = {stem: arch.resolve(stem) for stem in modules}
    assert [stem for stem, meaning in found.items() if meaning is None] == []
    assert len({(each.component, each.path, each.rows) for each in found.values()}) == len(modules)
    for stem, each in found.items():
        body = arch.spell(each.component, each.path, each.rows, each.dialect, each.separator)
        assert each.prefix + body == stem
        assert each.dialect == arch.component(each.component).kohya_dialect


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trainers_network_is_detected(layout):
    modules = read(NAMES / "kohya_layouts.json")[layout]
    detection = detect({stem: (shape[0], shape[1]) for stem, shape in modules.items()}, {})
    assert (detection.arch, detection.coverage, detection.notes) == (LAYOUTS[layout], 1.0, ())
    assert set(detection.resolved) == set(modules)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_other_architecture_explains_a_network_as_well_without_a_width_rule(layout):
    modules = read(NAMES / "kohya_layouts.json")[layout]
    alike = {"sd15", "sd2"} if LAYOUTS[layout] in {"sd15", "sd2"} else {LAYOUTS[layout]}
    detection = detect(dict.fromkeys(modules), {})
    assert set(detection.candidates or (detection.arch,)) == alike


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
        ("flux_lokr_bfl_format", NATIVE),
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
