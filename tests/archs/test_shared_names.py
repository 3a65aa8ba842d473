"""The tables against names obtained by running other implementations, and against trainers' networks."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from loratools import archs
from loratools.archs import detect
from loratools.archs._names import parse
from loratools.archs._table import DIFFUSERS, NATIVE
from loratools.model import Rows
from tests.archs.hunyuan15 import in_comfy_names

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
NAMES = SHARED / "names"

FLUX = {"transformer": "denoiser", "te1_clip_l": "text_encoder", "te_t5xxl": "text_encoder_2"}
SD3 = {
    "transformer": "denoiser",
    "te1_clip_l": "text_encoder",
    "te2_clip_g": "text_encoder_2",
    "te3_t5xxl": "text_encoder_3",
}
DENOISER = {"transformer": "denoiser"}
# Every file of names of an image or video model, and what it calls the components.
COMPONENTS = {
    "auraflow": ("auraflow", DENOISER),
    "chroma": ("chroma", {"transformer": "denoiser", "te_t5xxl": "text_encoder"}),
    "cogvideox_5b": ("cogvideox", DENOISER),
    "flux2_dev": ("flux2", DENOISER),
    "flux2_klein_4b": ("flux2", DENOISER),
    "flux2_klein_9b": ("flux2", DENOISER),
    "flux_dev": ("flux", FLUX),
    "flux_schnell": ("flux", FLUX),
    "hunyuan_dit_v1.2": ("hunyuan_dit", DENOISER),
    "hunyuan_video": ("hunyuan_video", DENOISER),
    "hunyuan_video15": ("hunyuan_video15", DENOISER),
    "ltx_video": ("ltx_video", DENOISER),
    "lumina2": ("lumina2", {"transformer": "denoiser", "te_gemma2_2b": "text_encoder"}),
    "pixart_sigma": ("pixart", DENOISER),
    "qwen_image": ("qwen_image", DENOISER),
    "sana": ("sana", DENOISER),
    "sd15": ("sd15", {"unet": "denoiser", "te": "text_encoder"}),
    "sd21": ("sd2", {"unet": "denoiser", "te": "text_encoder"}),
    "sd35_large": ("sd35_large", SD3),
    "sd35_medium": ("sd3", SD3),
    "sd3_medium": ("sd3", SD3),
    "sdxl": ("sdxl", {"unet": "denoiser", "te1": "text_encoder", "te2": "text_encoder_2"}),
    "stable_cascade_stage_c": ("stable_cascade", DENOISER),
    "wan21_i2v_14b": ("wan", DENOISER),
    "wan21_t2v_1.3b": ("wan", DENOISER),
    "wan21_t2v_14b": ("wan", DENOISER),
    "wan22_i2v_a14b": ("wan", DENOISER),
    "wan22_t2v_a14b": ("wan", DENOISER),
    "wan22_ti2v_5b": ("wan", DENOISER),
    "z_image": ("z_image", DENOISER),
}
# The networks that Kohya's trainers make.
LAYOUTS = {
    "anima": "anima",
    "anima_llm_adapter": "anima",
    "flux1": "flux",
    "flux_2": "flux2",
    "flux_kontext": "flux",
    "framepack": "hunyuan_video",
    "hunyuan_image": "hunyuan_image",
    "hunyuan_video": "hunyuan_video",
    "hunyuan_video_1_5": "hunyuan_video15",
    "lumina2": "lumina2",
    "qwen_image": "qwen_image",
    "sd15": "sd15",
    "sd15_locon": "sd15",
    "sd21": "sd2",
    "sd21_locon": "sd2",
    "sd3.5_large": "sd35_large",
    "sd3.5_medium": "sd3",
    "sd3_medium": "sd3",
    "sdxl": "sdxl",
    "sdxl_locon": "sdxl",
    "wan_i2v_14B": "wan",
    "wan_t2v_1.3B": "wan",
    "wan_t2v_14B": "wan",
    "z_image": "z_image",
}
# Which ones are left where no shapes are known: those whose names, and numbers of blocks, are the same.
ALIKE = [
    {"sd15", "sd2"},
    {"hunyuan_image", "hunyuan_video"},
    {"ideogram4", "z_image"},
]


def read(path):
    if not path.exists():
        pytest.skip(f"{path.name} is not among the shared data here")
    data = json.loads(path.read_text())
    return in_comfy_names(data) if path.stem == "hunyuan_video15" else data


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
    *spans, total = entry["rows"]
    if not isinstance(spans[0], list):
        spans = [spans]
    return [(Fraction(start, total), Fraction(stop, total)) for start, stop in spans]


def shape_of(entry, *, whole=False):
    """(out, in) of a module, or of the fused weight that it is some rows of."""
    out, *into = entry["shape"]
    if whole and entry["rows"]:
        out = entry["rows"][-1]
    return (out, into[0]) if into else None


def native(entry):
    # A fused attention's weight is a bare parameter in the checkpoint.
    return entry["native"].removesuffix("_weight")


def test_every_file_of_names_is_tested():
    if not NAMES.exists():
        pytest.skip("the shared data is not here")
    found = {
        path.stem
        for path in NAMES.glob("*.json")
        if {"unet", "transformer"} & read(path).get("components", {}).keys()
    }
    assert found == set(COMPONENTS)
    assert set(read(NAMES / "kohya_layouts.json")) == set(LAYOUTS)


@pytest.mark.parametrize("table", COMPONENTS)
def test_every_module_agrees(table):
    name, components = COMPONENTS[table]
    arch = archs.get(name)
    data = read(NAMES / f"{table}.json")["components"]
    assert set(data) == set(components)
    for part, component in components.items():
        prefixes = data[part]["prefixes"]
        for entry in data[part]["modules"]:
            found = arch.resolve(prefixes["diffusers"] + entry["diffusers"])
            assert (found.component, found.path) == (component, native(entry))
            assert intervals(found.rows) == expected(entry)
            assert arch.spell(component, found.path, found.rows, DIFFUSERS) == entry["diffusers"]
            assert arch.spell(component, found.path, None, NATIVE) == native(entry)
            # Only a denoiser goes without a prefix.
            if prefixes["native"] or component == "denoiser":
                whole = arch.resolve(prefixes["native"] + native(entry))
                assert (whole.component, whole.path, whole.rows) == (component, native(entry), None)


@pytest.mark.parametrize("table", COMPONENTS)
def test_every_flattened_name_agrees(table):
    name, components = COMPONENTS[table]
    arch = archs.get(name)
    data = read(NAMES / f"{table}.json")["components"]
    for part, component in components.items():
        for entry in data[part]["modules"]:
            stems = {entry[kind] for kind in ("kohya", "kohya_diffusers", "kohya_native") if entry.get(kind)}
            assert stems
            for stem in (stem.removesuffix("_weight") for stem in stems):
                found = arch.resolve(stem)
                assert (found.component, found.path) == (component, native(entry))
                body = arch.spell(component, found.path, found.rows, found.dialect, "_")
                assert found.prefix + body == stem


SPELLINGS = ("native", "diffusers", "kohya", "kohya_diffusers", "kohya_native")


def spelt(entries, spelling, *, whole):
    """The modules that have a spelling, with their (out, in)."""
    return {
        entry[spelling].removesuffix("_weight"): shape_of(entry, whole=whole)
        for entry in entries
        if entry.get(spelling)
    }


@pytest.mark.parametrize("table", COMPONENTS)
def test_a_file_of_all_names_is_detected(table):
    name, components = COMPONENTS[table]
    data = read(NAMES / f"{table}.json")["components"]
    (part,) = (part for part, component in components.items() if component == "denoiser")
    for spelling in SPELLINGS:
        # Kohya's files have q, k and v of these apart.
        split = name in ("z_image", "hunyuan_video15")
        whole = spelling in ("native", "kohya_native") or (spelling == "kohya" and not split)
        stems = spelt(data[part]["modules"], spelling, whole=whole)
        if stems:
            detection = detect(stems, {})
            assert (detection.arch, detection.candidates, detection.coverage) == (name, (), 1.0)
            assert detection.notes == ()
            left = detect(dict.fromkeys(stems), {})
            alike = [{name}, *(each for each in ALIKE if name in each)]
            assert set(left.candidates or (left.arch,)) in alike


@pytest.mark.parametrize("table", COMPONENTS)
def test_a_file_of_a_single_weight_of_each_block_is_never_silently_anothers(table):
    """Names that relatives share: whichever is chosen, this one is among the candidates that are named."""
    name, components = COMPONENTS[table]
    data = read(NAMES / f"{table}.json")["components"]
    (part,) = (part for part, component in components.items() if component == "denoiser")
    for spelling in ("native", "diffusers"):
        files = {}
        for stem, shape in spelt(data[part]["modules"], spelling, whole=spelling == "native").items():
            files.setdefault(parse(stem)[0], {})[stem] = shape
        for stems in files.values():
            detection = detect(stems, {})
            assert name in (detection.candidates or (detection.arch,)), stems
            assert all(each in detection.notes[0] for each in detection.candidates)


@pytest.mark.parametrize("table", COMPONENTS)
def test_every_prefix_of_the_data_is_known(table):
    name, components = COMPONENTS[table]
    arch = archs.get(name)
    data = read(NAMES / f"{table}.json")["components"]
    for part, component in components.items():
        entry = data[part]["modules"][0]
        for layout, prefix in data[part]["prefixes"].items():
            # One encoder of several cannot be told by a prefix that all components share.
            shared = layout == "peft" and arch.component(component).prefix("peft") is None
            if "(" in prefix or shared or not (prefix or component == "denoiser"):
                continue
            for body in (native(entry), entry["diffusers"]):
                assert arch.resolve(prefix + body).component == component


@pytest.mark.parametrize("table", ["flux_dev", "sd15", "sd21", "sdxl"])
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
        # FramePack's trainer works on diffusers' model.
        dialect = DIFFUSERS if layout == "framepack" else arch.component(each.component).kohya_dialect
        assert each.dialect == dialect


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trainers_network_is_detected(layout):
    modules = read(NAMES / "kohya_layouts.json")[layout]
    detection = detect({stem: (shape[0], shape[1]) for stem, shape in modules.items()}, {})
    assert (detection.arch, detection.coverage) == (LAYOUTS[layout], 1.0)
    # Kontext's network leaves out the modulations, which are all that tells Flux.1's blocks from Chroma's.
    shared = layout == "flux_kontext"
    assert detection.candidates == (("chroma", "flux") if shared else ())
    assert len(detection.notes) == shared
    assert set(detection.resolved) == set(modules)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_other_architecture_explains_a_network_as_well_without_a_width_rule(layout):
    modules = read(NAMES / "kohya_layouts.json")[layout]
    name = LAYOUTS[layout]
    alike = next((each for each in ALIKE if name in each), {name})
    detection = detect(dict.fromkeys(modules), {})
    assert set(detection.candidates or (detection.arch,)) == (
        {"chroma", "flux"} if layout == "flux_kontext" else alike
    )
