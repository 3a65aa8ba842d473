"""Wan, Qwen-Image, Z-Image, Lumina 2, LTX-Video, Anima and HiDream, against names that other tools were run for."""

import json
import struct
from fractions import Fraction
from pathlib import Path

import pytest

from loratools import archs
from loratools.archs import detect
from loratools.archs._table import DIFFUSERS, NATIVE

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
DENOISER = {"transformer": "denoiser"}
TABLES = {
    "wan21_t2v_1.3b": ("wan", DENOISER),
    "wan21_t2v_14b": ("wan", DENOISER),
    "wan21_i2v_14b": ("wan", DENOISER),
    "wan22_t2v_a14b": ("wan", DENOISER),
    "wan22_i2v_a14b": ("wan", DENOISER),
    "wan22_ti2v_5b": ("wan", DENOISER),
    "qwen_image": ("qwen_image", DENOISER),
    "z_image": ("z_image", DENOISER),
    "lumina2": ("lumina2", {**DENOISER, "te_gemma2_2b": "text_encoder"}),
    "ltx_video": ("ltx_video", DENOISER),
}
LAYOUTS = {
    "wan_t2v_1.3B": "wan",
    "wan_t2v_14B": "wan",
    "wan_i2v_14B": "wan",
    "qwen_image": "qwen_image",
    "z_image": "z_image",
    "lumina2": "lumina2",
    "anima": "anima",
    "anima_llm_adapter": "anima",
}
NAMES = ["wan", "qwen_image", "z_image", "lumina2", "ltx_video", "anima", "hidream"]


def read(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path.name} is not among the shared data here")
    return json.loads(path.read_text())


def components(table):
    """(component, its data) of a names file."""
    data = read("names", f"{table}.json")["components"]
    return [(name, data[part]) for part, name in TABLES[table][1].items()]


def spans(rows):
    """The rows of a weight as fractions of it, in order; None for all."""
    return rows and [(Fraction(start, rows.of), Fraction(stop, rows.of)) for start, stop in rows.spans]


def spans_of(entry):
    if entry["rows"] is None:
        return None
    start, stop, total = entry["rows"]
    return [(Fraction(start, total), Fraction(stop, total))]


@pytest.mark.parametrize("table", TABLES)
def test_every_module_is_the_weight_that_other_tools_make_of_it(table):
    arch = archs.get(TABLES[table][0])
    for component, data in components(table):
        prefixes = data["prefixes"]
        for entry in data["modules"]:
            assert not entry["swap"]
            expected = (component, entry["native"], spans_of(entry))
            dotted = arch.resolve(prefixes["diffusers"] + entry["diffusers"])
            flat = arch.resolve(prefixes["kohya"] + entry["diffusers"].replace(".", "_"))
            for found in (dotted, flat):
                assert (found.component, found.path, spans(found.rows)) == expected
            for stem in (
                prefixes["comfy_native"] + entry["native"],
                prefixes["kohya"] + entry["native"].replace(".", "_"),
            ):
                whole = arch.resolve(stem)
                assert (whole.component, whole.path, whole.rows) == (*expected[:2], None)
            assert arch.resolve(entry["kohya"]).path == entry["native"]


@pytest.mark.parametrize("table", TABLES)
def test_every_weight_is_spelt_as_other_tools_spell_it(table):
    arch = archs.get(TABLES[table][0])
    for component, data in components(table):
        part = arch.component(component)
        for entry in data["modules"]:
            rows = arch.resolve(data["prefixes"]["diffusers"] + entry["diffusers"]).rows
            assert arch.spell(component, entry["native"], rows, DIFFUSERS) == entry["diffusers"]
            assert arch.spell(component, entry["native"], None, NATIVE) == entry["native"]
            whole_or_part = rows if part.kohya_dialect == DIFFUSERS else None
            flat = arch.spell(component, entry["native"], whole_or_part, part.kohya_dialect, "_")
            assert part.prefix("kohya") + flat == entry["kohya"]
        modules = {entry["native"] for entry in data["modules"]}
        split = {entry["native"] for entry in data["modules"] if entry["rows"] is not None}
        assert {path for path in modules if arch.pieces(component, path, DIFFUSERS) != (None,)} == split


@pytest.mark.parametrize("table", TABLES)
def test_norms_and_free_parameters_have_their_names_too(table):
    arch = archs.get(TABLES[table][0])
    for component, data in components(table):
        for entry in data.get("others", ()):
            path, twin = (
                entry[side].removesuffix(".weight").removesuffix(".bias") for side in ("native", "diffusers")
            )
            for stem in (path, data["prefixes"]["diffusers"] + twin):
                found = arch.resolve(stem)
                assert (found.component, found.path, found.rows) == (component, path, None)


@pytest.mark.parametrize("table", TABLES)
def test_every_prefix_of_the_data_is_understood(table):
    arch = archs.get(TABLES[table][0])
    for component, data in components(table):
        entry = next(
            entry
            for entry in data["modules"]
            if entry["kohya_made"] == "default" or "attn1" in entry["native"]
        )
        named = [prefix for prefix in data["prefixes"].values() if prefix or component == "denoiser"]
        assert named
        for prefix in named:
            for body in (entry["native"], entry["diffusers"]):
                found = arch.resolve(prefix + body)
                assert (found.component, found.path) == (component, entry["native"])


def shapes(data, names):
    """The stems of a dialect with the shapes of their weights: the parts' rows added up where it fuses them."""
    found = {}
    for entry in data["modules"]:
        stem = data["prefixes"]["comfy_native" if names == "native" else "diffusers"] + entry[names]
        height, width = entry["shape"][:2]
        found[stem] = (height + (found[stem][0] if stem in found else 0), width)
    return found


@pytest.mark.parametrize("names", ["native", "diffusers"])
@pytest.mark.parametrize("table", TABLES)
def test_a_files_own_names_and_shapes_are_detected(table, names):
    data = dict(components(table))["denoiser"]
    stems = shapes(data, names)
    detection = detect(stems, {})
    assert (detection.arch, detection.coverage, detection.notes) == (TABLES[table][0], 1.0, ())
    assert set(detection.resolved) == set(stems)


@pytest.mark.parametrize(
    ("table", "names", "words"),
    [
        ("wan21_t2v_14b", "native", ("self_attn",)),
        ("wan21_t2v_1.3b", "diffusers", ("attn1.to_", "attn2.to_")),
        ("wan22_ti2v_5b", "diffusers", ("ffn.net",)),
        # Hunyuan-DiT, CogVideoX and PixArt have these names too, at other widths.
        ("wan22_ti2v_5b", "diffusers", ("blocks.2.attn1.to_q",)),
        ("qwen_image", "diffusers", ("img_mlp", "txt_mlp")),
        ("z_image", "native", ("layers.0.attention", "layers.1.attention")),
        ("z_image", "diffusers", ("attention.to_",)),
        ("z_image", "native", ("feed_forward.w1",)),
        ("lumina2", "native", ("layers.0.attention", "layers.1.attention")),
        ("lumina2", "diffusers", ("attn.to_",)),
        ("lumina2", "native", ("feed_forward.w1",)),
        ("ltx_video", "diffusers", ("attn1.to_", "attn2.to_")),
        ("ltx_video", "diffusers", ("blocks.3.attn2.to_k", "blocks.3.attn2.to_v")),
    ],
)
def test_adapters_of_some_weights_are_detected(table, names, words):
    stems = shapes(dict(components(table))["denoiser"], names)
    some = {stem: shape for stem, shape in stems.items() if any(word in stem for word in words)}
    assert 0 < len(some) < len(stems)
    assert detect(some, {}).arch == TABLES[table][0]


def test_the_attention_of_all_of_qwen_images_blocks_is_nobody_elses():
    stems = shapes(dict(components("qwen_image"))["denoiser"], "diffusers")
    attention = {stem: shape for stem, shape in stems.items() if ".attn." in stem}
    assert detect(attention, {}).arch == "qwen_image"
    first = {stem: shape for stem, shape in attention.items() if ".transformer_blocks.3." in stem}
    # Flux.1's fourth block has the same names and shapes: the metadata decides, and nothing else can.
    found = detect(first, {})
    assert found.arch == "unknown"
    assert {"flux", "qwen_image"} <= set(found.candidates)
    assert detect(first, {}, "Qwen/Qwen-Image").arch == "qwen_image"


def test_animas_attention_and_ltx_videos_are_told_apart_by_the_prompts_width():
    stem = "transformer.transformer_blocks.0"
    shared = {f"{stem}.attn1.to_q": (2048, 2048), f"{stem}.attn2.to_q": (2048, 2048)}
    assert detect(shared, {}).candidates == ("anima", "ltx_video")
    for width, arch in ((1024, "anima"), (2048, "ltx_video")):
        assert detect({**shared, f"{stem}.attn2.to_k": (2048, width)}, {}).arch == arch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trainers_network_is_detected_and_every_module_is_a_weight_of_its_own(layout):
    modules = read("names", "kohya_layouts.json")[layout]
    detection = detect({stem: (shape[0], shape[1]) for stem, shape in modules.items()}, {})
    assert (detection.arch, detection.coverage, detection.notes) == (LAYOUTS[layout], 1.0, ())
    arch = archs.get(detection.arch)
    found = detection.resolved
    assert len({(each.component, each.path, each.rows) for each in found.values()}) == len(modules)
    for stem, each in found.items():
        part = arch.component(each.component)
        assert each.dialect == part.kohya_dialect
        name = arch.spell(each.component, each.path, each.rows, part.kohya_dialect, "_")
        assert part.prefix("kohya") + name == stem


@pytest.mark.parametrize(
    ("skeleton", "arch"),
    [
        ("anima_lora_kohya_format", "anima"),
        ("anima_lora_lokr_format", "anima"),
        ("qwen_image_lora_kohya_format", "qwen_image"),
    ],
)
def test_layouts_of_real_files_are_detected_by_their_names(skeleton, arch):
    # By their names alone: some shapes in these are not those of the models.
    keys = read("skeletons", f"{skeleton}.json")
    stems = dict.fromkeys(stem_of(key) for key in keys)
    detection = detect(stems, {})
    assert (detection.arch, detection.coverage) == (arch, 1.0)


def stem_of(key):
    """A key without its factor suffix, for the suffixes of the reference cases."""
    for mark in (".lora_", ".lokr_", ".alpha", ".diff", ".dora_scale"):
        key = key.partition(mark)[0]
    return key


def keys_of(case, name):
    path = SHARED / "oracle" / case / name / ("lora" if name == "input" else "converted")
    path = path.with_suffix(".safetensors")
    if not path.exists():
        pytest.skip(f"{case} is not among the shared data here")
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return [key for key in json.loads(file.read(size)) if key != "__metadata__"]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("conv__anima_native", "anima"),
        ("conv__hidream_native", "hidream"),
        ("conv__lumina2_native", "lumina2"),
        ("conv__qwen_kohya", "qwen_image"),
        ("conv__qwen_bare_alpha", "qwen_image"),
        ("conv__wan_ai_toolkit", "wan"),
        ("conv__wan_musubi", "wan"),
        ("conv__zimage_kohya", "z_image"),
        ("conv__zimage_kohya_fused_qkv", "z_image"),
        ("conv__zimage_lokr", "z_image"),
    ],
)
def test_names_become_those_that_diffusers_makes_of_them(case, name):
    arch = archs.get(name)
    spelt = set()
    for stem in {stem_of(key) for key in keys_of(case, "input")}:
        found = arch.resolve(stem)
        pieces = (found.rows,) if found.rows else arch.pieces(found.component, found.path, DIFFUSERS)
        prefix = arch.component(found.component).prefix("diffusers")
        spelt |= {prefix + arch.spell(found.component, found.path, rows, DIFFUSERS) for rows in pieces}
    assert spelt == {stem_of(key) for key in keys_of(case, "expected")}


def test_lumina2s_fused_rows_are_three_parts_of_q_to_one_of_k_and_v():
    pieces = archs.get("lumina2").pieces("denoiser", "layers.0.attention.qkv", DIFFUSERS)
    assert [spans(rows)[0] for rows in pieces] == [
        (Fraction(0), Fraction(3, 5)),
        (Fraction(3, 5), Fraction(4, 5)),
        (Fraction(4, 5), Fraction(1)),
    ]


@pytest.mark.parametrize(
    ("name", "stem", "component", "path"),
    [
        # Wan 2.2's second transformer, and VACE's own blocks.
        ("wan", "transformer_2.blocks.39.attn2.to_out.0", "denoiser", "blocks.39.cross_attn.o"),
        ("wan", "transformer.vace_blocks.7.proj_out", "denoiser", "vace_blocks.7.after_proj"),
        ("wan", "diffusion_model.vace_blocks.0.before_proj", "denoiser", "vace_blocks.0.before_proj"),
        ("wan", "transformer.vace_blocks.1.attn2.to_k", "denoiser", "vace_blocks.1.cross_attn.k"),
        (
            "qwen_image",
            "text_encoder.model.language_model.layers.27.self_attn.q_proj",
            "text_encoder",
            "model.layers.27.self_attn.q_proj",
        ),
        (
            "qwen_image",
            "text_encoders.qwen25_7b.transformer.model.layers.0.mlp.up_proj",
            "text_encoder",
            "model.layers.0.mlp.up_proj",
        ),
        ("anima", "lora_te_layers_3_mlp_down_proj", "text_encoder", "layers.3.mlp.down_proj"),
        (
            "anima",
            "text_encoders.qwen3_06b.transformer.model.layers.3.self_attn.o_proj",
            "text_encoder",
            "layers.3.self_attn.o_proj",
        ),
        ("anima", "text_conditioner.out_proj", "text_conditioner", "out_proj"),
        ("anima", "diffusion_model.llm_adapter.blocks.5.mlp.2", "text_conditioner", "blocks.5.mlp.2"),
        ("anima", "diffusion_model.blocks.5.mlp.layer2", "denoiser", "blocks.5.mlp.layer2"),
        ("anima", "transformer.norm_out.linear_2", "denoiser", "final_layer.adaln_modulation.2"),
        (
            "hidream",
            "lora_unet_double_stream_blocks_15_block_ff_i_experts_3_w2",
            "denoiser",
            "double_stream_blocks.15.block.ff_i.experts.3.w2",
        ),
        (
            "hidream",
            "lora_transformer_double_stream_blocks_0_block_attn1_to_q_t",
            "denoiser",
            "double_stream_blocks.0.block.attn1.to_q_t",
        ),
        (
            "hidream",
            "lycoris_single_stream_blocks_31_block_attn1_to_out",
            "denoiser",
            "single_stream_blocks.31.block.attn1.to_out",
        ),
        (
            "hidream",
            "transformer.single_stream_blocks.0.block.ff_i.gate",
            "denoiser",
            "single_stream_blocks.0.block.ff_i.gate",
        ),
        (
            "hidream",
            "lora_te2_text_model_encoder_layers_31_mlp_fc2",
            "text_encoder_2",
            "text_model.encoder.layers.31.mlp.fc2",
        ),
        (
            "hidream",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            "text_encoder_3",
            "encoder.block.0.layer.0.SelfAttention.q",
        ),
        (
            "hidream",
            "lora_te4_model_layers_31_self_attn_k_proj",
            "text_encoder_4",
            "model.layers.31.self_attn.k_proj",
        ),
    ],
)
def test_names_outside_the_shared_tables(name, stem, component, path):
    found = archs.get(name).resolve(stem)
    assert (found.component, found.path, found.rows) == (component, path, None)
    spelt = archs.get(name).spell(component, path, None, found.dialect, found.separator)
    assert found.prefix + spelt == stem


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        # Single stream blocks have no second set of projections; the prompt's refiner is not modulated.
        ("hidream", "transformer.single_stream_blocks.0.block.attn1.to_q_t"),
        ("hidream", "transformer.single_stream_blocks.0.block.ff_t.w1"),
        ("lumina2", "diffusion_model.context_refiner.0.adaLN_modulation.1"),
        ("lumina2", "transformer.context_refiner.0.norm1.norm"),
        ("anima", "diffusion_model.blocks.0.self_attn.o_proj"),
        ("anima", "text_conditioner.blocks.0.self_attn.output_proj"),
        ("wan", "transformer.blocks.0.proj_in"),
    ],
)
def test_weights_that_an_architecture_has_not(name, absent):
    assert archs.get(name).resolve(absent) is None


@pytest.mark.parametrize(
    ("name", "kohya", "ai_toolkit"),
    [
        ("wan", NATIVE, ("diffusion_model.", NATIVE)),
        ("qwen_image", NATIVE, ("diffusion_model.", DIFFUSERS)),
        ("z_image", DIFFUSERS, ("diffusion_model.", DIFFUSERS)),
        ("lumina2", NATIVE, ("transformer.", DIFFUSERS)),
        ("ltx_video", NATIVE, ("diffusion_model.", NATIVE)),
        ("anima", NATIVE, ("diffusion_model.", NATIVE)),
        ("hidream", NATIVE, ("diffusion_model.", DIFFUSERS)),
    ],
)
def test_the_dialects_that_trainers_write(name, kohya, ai_toolkit):
    denoiser = archs.get(name).components[0]
    assert denoiser.dialect("kohya", "kohya") == kohya
    assert (denoiser.prefix("ai-toolkit"), denoiser.dialect("ai-toolkit", DIFFUSERS)) == ai_toolkit
    assert denoiser.dialect("comfy", NATIVE) == NATIVE
    assert denoiser.dialect("lycoris", DIFFUSERS) == DIFFUSERS


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_has_a_prefix_for_the_denoiser(name):
    denoiser = archs.get(name).components[0]
    written = {
        layout: denoiser.prefix(layout)
        for layout in ("kohya", "diffusers", "peft", "comfy", "lycoris", "onetrainer", "checkpoint")
    }
    assert written == {
        "kohya": "lora_unet_",
        "diffusers": "transformer.",
        "peft": "base_model.model.",
        "comfy": "diffusion_model.",
        "lycoris": "lycoris_",
        "onetrainer": "lora_transformer_",
        "checkpoint": "model.diffusion_model.",
    }
    trained_by_musubi = {"wan", "qwen_image", "z_image"}
    assert denoiser.prefix("musubi") == ("lora_unet_" if name in trained_by_musubi else None)
