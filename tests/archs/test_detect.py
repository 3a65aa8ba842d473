"""Detection: names first, then widths, then metadata, and otherwise an honest ambiguity."""

import subprocess
import sys

import pytest

from loratools import archs
from loratools.archs import detect
from loratools.archs._table import DIFFUSERS, NATIVE


def spelt(name, paths, layout, dialect, separator):
    """The stems of denoiser weights in a layout, split as the dialect splits them."""
    arch = archs.get(name)
    prefix = arch.components[0].prefix(layout) if layout else ""
    return [
        prefix + arch.spell("denoiser", path, rows, dialect, separator)
        for path in paths
        for rows in arch.pieces("denoiser", path, dialect)
    ]


SD = [
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k",
    "middle_block.1.transformer_blocks.0.attn2.to_k",
    "output_blocks.11.1.transformer_blocks.0.attn1.to_q",
]
XL = [
    "input_blocks.4.1.transformer_blocks.1.attn2.to_k",
    "middle_block.1.transformer_blocks.9.attn2.to_k",
    "output_blocks.0.1.transformer_blocks.3.attn1.to_q",
]
# What relatives of Flux.1 have too, and two weights that none of them has under all of Flux.1's names.
FLUX_BLOCKS = ["double_blocks.0.img_attn.qkv", "single_blocks.37.linear1", "single_blocks.3.linear2"]
FLUX = [*FLUX_BLOCKS, "double_blocks.0.img_mod.lin", "txt_in"]
BOTH = ["middle_block.1.transformer_blocks.0.attn2.to_k"]
SPELLINGS = [
    ("kohya", NATIVE, "_"),
    ("kohya", DIFFUSERS, "_"),
    ("diffusers", DIFFUSERS, "."),
    ("comfy", NATIVE, "."),
    ("peft", DIFFUSERS, "."),
    ("lycoris", DIFFUSERS, "_"),
    (None, DIFFUSERS, "."),
    (None, NATIVE, "."),
    (None, NATIVE, "_"),
]


def with_widths(stems, size):
    return {stem: (320, size if "attn2" in stem else 320) for stem in stems}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("name", "paths", "context"),
    [("sd15", SD, 768), ("sd2", SD, 1024), ("sdxl", XL, 2048), ("flux", FLUX, 3072)],
)
def test_every_spelling_is_detected(name, paths, context, spelling):
    stems = spelt(name, paths, *spelling)
    widths = dict.fromkeys(stems) if name == "flux" else with_widths(stems, context)
    detection = detect(widths, {})
    assert (detection.arch, detection.candidates, detection.coverage, detection.notes) == (name, (), 1.0, ())
    assert {each.path for each in detection.resolved.values()} == set(paths)
    assert {each.dialect for each in detection.resolved.values()} == {spelling[1]}


@pytest.mark.parametrize("context", [None, 32])
def test_tiny_or_unknown_widths_leave_sd1_and_sd2_open(context):
    stems = spelt("sd15", SD, "kohya", DIFFUSERS, "_")
    widths = dict.fromkeys(stems) if context is None else with_widths(stems, context)
    detection = detect(widths, {})
    assert (detection.arch, detection.candidates) == ("unknown", ("sd15", "sd2"))
    assert "sd15 and sd2" in detection.notes[0]
    assert {stem: each.path for stem, each in detection.resolved.items()} == {stem: stem for stem in stems}


@pytest.mark.parametrize(
    ("metadata", "base_model", "arch"),
    [
        ({"ss_base_model_version": "sd_v1"}, "", "sd15"),
        ({"ss_base_model_version": "sd_1.5"}, "", "sd15"),
        ({"ss_base_model_version": "sd_v2_v"}, "", "sd2"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "", "sd15"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "", "sd2"),
        ({}, "runwayml/stable-diffusion-v1-5", "sd15"),
        ({}, "stabilityai/stable-diffusion-2-1-base", "sd2"),
        ({"ss_sd_model_name": "v1-5-pruned.safetensors"}, "", "sd15"),
    ],
)
def test_metadata_decides_what_names_and_widths_leave_open(metadata, base_model, arch):
    stems = dict.fromkeys(spelt("sd15", SD, "kohya", DIFFUSERS, "_"))
    detection = detect(stems, metadata, base_model)
    assert (detection.arch, detection.notes) == (arch, ())


def test_the_more_reliable_metadata_decides_and_the_rest_is_noted():
    stems = dict.fromkeys(spelt("sd15", SD, "kohya", DIFFUSERS, "_"))
    detection = detect(stems, {"ss_base_model_version": "sd_v2"}, "runwayml/stable-diffusion-v1-5")
    assert detection.arch == "sd2"
    assert len(detection.notes) == 1
    assert "stable-diffusion-v1-5 (sd15), but by ss_base_model_version it is sd2" in detection.notes[0]


def test_names_win_over_metadata_that_lies():
    stems = dict.fromkeys(spelt("flux", FLUX, "diffusers", DIFFUSERS, "."))
    detection = detect(stems, {"ss_base_model_version": "sd_1.5"})
    assert (detection.arch, detection.coverage) == ("flux", 1.0)
    assert detection.notes == ("ss_base_model_version says sd_1.5 (sd15), but by its names it is flux",)


def test_widths_win_over_metadata_that_lies():
    stems = with_widths(spelt("sd15", SD, "kohya", DIFFUSERS, "_"), 1024)
    detection = detect(
        stems, {"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"}
    )
    assert detection.arch == "sd2"
    assert [note.partition(" ")[0] for note in detection.notes] == [
        "ss_base_model_version",
        "modelspec.architecture",
    ]
    assert "but by its names and widths it is sd2" in detection.notes[0]


def test_metadata_of_an_architecture_that_does_not_fit_leaves_the_ambiguity():
    stems = dict.fromkeys(spelt("sd15", SD, "kohya", DIFFUSERS, "_"))
    detection = detect(stems, {"ss_base_model_version": "flux1"})
    assert (detection.arch, detection.candidates) == ("unknown", ("sd15", "sd2"))


@pytest.mark.parametrize(("context", "arch"), [(768, "sd15"), (1024, "sd2"), (2048, "sdxl")])
def test_a_file_of_what_all_unets_share_is_told_by_its_context_width(context, arch):
    stems = spelt("sd15", BOTH, "diffusers", DIFFUSERS, ".")
    assert detect(with_widths(stems, context), {}).arch == arch
    assert detect(dict.fromkeys(stems), {}).candidates == ("sd15", "sd2", "sdxl")


@pytest.mark.parametrize(
    ("encoder", "archs_left"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", ("sd15", "sd2")),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", ("sdxl",)),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", ("sdxl",)),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", ("sdxl",)),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", ("sd15", "sd2", "sdxl")),
    ],
)
def test_the_prefix_of_a_text_encoder_tells_unets_apart(encoder, archs_left):
    stems = [*spelt("sd15", BOTH, "kohya", DIFFUSERS, "_"), encoder]
    detection = detect(dict.fromkeys(stems), {})
    assert (detection.candidates or (detection.arch,)) == archs_left


@pytest.mark.parametrize(
    ("width", "candidates"), [(768, ("flux", "sd15", "sd3", "sd35_large", "sdxl")), (1024, ())]
)
def test_a_lone_text_encoder_is_told_by_its_width_as_far_as_it_goes(width, candidates):
    stems = {
        f"text_encoder.text_model.encoder.layers.{layer}.self_attn.q_proj": (width, width)
        for layer in range(3)
    }
    detection = detect(stems, {})
    assert detection.candidates == candidates
    assert detection.arch == ("unknown" if candidates else "sd2")


def test_pruned_and_deeper_variants_are_the_same_architecture():
    pruned = [f"lora_unet_double_blocks_{block}_img_mod_lin" for block in (0, 7, 18)]
    assert detect(dict.fromkeys(pruned), {}).arch == "flux"
    deeper = [f"lora_unet_input_blocks_8_1_transformer_blocks_{block}_attn1_to_q" for block in (0, 30, 99)]
    assert detect(dict.fromkeys(deeper), {}).arch == "sdxl"


def test_names_that_an_architecture_does_not_have_are_counted_and_noted():
    stems = [*spelt("flux", FLUX, "kohya", NATIVE, "_"), "lora_unet_double_blocks_0_extra"]
    detection = detect(dict.fromkeys(stems), {})
    assert (detection.arch, detection.coverage) == ("flux", 5 / 6)
    assert "1 of 6 names are not those of flux (first: lora_unet_double_blocks_0_extra)" in detection.notes
    assert "lora_unet_double_blocks_0_extra" not in detection.resolved


def test_less_than_half_explained_is_unknown():
    stems = [*spelt("flux", FLUX[:1], "kohya", NATIVE, "_"), "lora_unet_blocks_0_q", "lora_unet_blocks_0_k"]
    detection = detect(dict.fromkeys(stems), {"ss_base_model_version": "flux1"})
    assert (detection.arch, detection.candidates, detection.coverage) == ("unknown", (), 0.0)
    assert set(detection.resolved) == set(stems)
    assert detection.notes == (
        "ss_base_model_version says flux1 (flux), but the names are not those of flux",
    )


def test_no_names_are_unknown():
    assert detect({}, {}).arch == "unknown"
    assert detect({}, {}, "meta-llama/Llama-3").resolved == {}


@pytest.mark.parametrize(
    ("stem", "base_model", "arch"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj", "meta-llama/Llama-2-7b-hf", "llm"),
        ("base_model.model.model.layers.3.mlp.experts.17.gate_proj", "", "llm"),
        ("base_model.model.transformer.h.0.attn.c_attn", "", "llm"),
        ("base_model.model.transformer.h.3.attn.attention.q_proj", "EleutherAI/gpt-neo-125M", "llm"),
        ("base_model.model.roberta.encoder.layer.0.attention.self.query", "", "llm"),
        ("base_model.model.deberta.encoder.layer.2.attention.self.query_proj", "", "llm"),
        ("base_model.model.gpt_neox.layers.0.attention.query_key_value", "", "llm"),
        ("base_model.model.encoder.block.0.layer.0.SelfAttention.q", "", "llm"),
        ("base_model.model.encoder.block.0.layer.0.SelfAttention.q", "google/flan-t5-xxl", "llm"),
        ("base_model.model.encoder.block.0.layer.0.SelfAttention.q", "lodestones/Chroma1-HD", "chroma"),
        ("base_model.model.text_model.encoder.layers.0.self_attn.q_proj", "", "vision"),
        ("base_model.model.model.decoder.layers.0.self_attn.q_proj", "facebook/opt-125m", "llm"),
        ("base_model.model.model.language_model.layers.0.self_attn.q_proj", "", "llm"),
        ("model.layers.23.self_attn.v_proj", "", "llm"),
        ("base_model.model.model.decoder.layers.0.encoder_attn.q_proj", "openai/whisper-small", "speech"),
        ("base_model.model.model.encoder.conv1", "", "speech"),
        ("base_model.model.wav2vec2.encoder.layers.0.attention.q_proj", "", "speech"),
        (
            "base_model.model.vit.encoder.layer.0.attention.attention.query",
            "nateraw/vit-age-classifier",
            "vision",
        ),
        ("base_model.model.vision_model.encoder.layers.0.self_attn.q_proj", "", "vision"),
        ("base_model.model.encoder.layers.0.self_attn.q_proj", "openai/whisper-small", "speech"),
        (
            "base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
            "openai/clip-vit-base-patch32",
            "vision",
        ),
        (
            "base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
            "runwayml/stable-diffusion-v1-5",
            "sd15",
        ),
        ("something.else.0.entirely", "", "unknown"),
        ("lora_unet_stages_0_q", "", "unknown"),
    ],
)
def test_examples(stem, base_model, arch):
    detection = detect({stem: None}, {}, base_model)
    assert detection.arch == arch
    assert detection.resolved[stem].path == stem.removeprefix("base_model.model.")


def test_detection_does_not_depend_on_the_order_of_names():
    stems = [
        *spelt("flux", FLUX, "kohya", NATIVE, "_"),
        "lora_unet_unknown_0",
        *spelt("sdxl", XL, "kohya", NATIVE, "_"),
    ]
    one, other = detect(dict.fromkeys(stems), {}), detect(dict.fromkeys(reversed(stems)), {})
    assert (one.arch, one.coverage) == (other.arch, other.coverage)
    assert dict(one.resolved) == dict(other.resolved)


def test_wans_blocks_in_diffusers_spelling_are_no_language_models():
    stems = [f"transformer.blocks.{n}.{part}" for n in range(3) for part in ("attn1.to_q", "ffn.net.0.proj")]
    assert detect(dict.fromkeys(stems), {}).arch == "wan"
    assert detect(dict.fromkeys(["transformer.blocks.0.attn.Wqkv"]), {}).arch == "llm"


def test_only_promising_architectures_are_imported():
    """What makes `info` quick: two dozen architectures would take longer to import than a file to read."""
    code = """
import sys
from loratools import archs
stems = ["lora_unet_input_blocks_4_1_proj_in", "lora_te2_text_model_encoder_layers_0_mlp_fc1"]
print(archs.detect(dict.fromkeys(stems), {"ss_base_model_version": "sd_v1"}).arch)
print(archs.get("sdxl").title, len(archs.all_archs()) > 20)
print(*sorted(name for name in sys.modules if name.startswith("loratools.archs.") and "._" not in name))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["sdxl", "Stable Diffusion XL True", "loratools.archs.sdxl"]
