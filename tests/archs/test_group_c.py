"""PixArt, AuraFlow, Hunyuan-DiT, CogVideoX, Sana, Stable Cascade, Flux.3, Ideogram 4; and Concept Sliders' names."""

import json
import struct
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest

from loratools import archs
from loratools.archs import detect
from loratools.archs._table import DIFFUSERS, NATIVE
from loratools.model import Rows

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
FILES = {
    "pixart_sigma": "pixart",
    "auraflow": "auraflow",
    "hunyuan_dit_v1.2": "hunyuan_dit",
    "cogvideox_5b": "cogvideox",
    "sana": "sana",
    "stable_cascade_stage_c": "stable_cascade",
}
THIRDS = tuple(Rows(((place, place + 1),), of=3) for place in range(3))
EXCHANGED = Rows(((1, 2), (0, 1)), of=2)


@cache
def component(file):
    path = SHARED / "names" / f"{file}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not among the shared data here")
    return json.loads(path.read_text())["components"]["transformer"]


def native(entry):
    # A fused attention's weight is a bare parameter in the checkpoint.
    return entry["native"].removesuffix("_weight")


def intervals(rows):
    """Rows as fractions of the whole weight."""
    if rows is None:
        return None
    return [(Fraction(start, rows.of), Fraction(stop, rows.of)) for start, stop in rows.spans]


def expected(entry):
    """The fractions of the whole weight that an entry of the data states."""
    if entry["swap"]:
        return intervals(EXCHANGED)
    if entry["rows"] is None:
        return None
    *spans, total = entry["rows"]
    spans = spans if isinstance(spans[0], list) else [spans]
    return [(Fraction(start, total), Fraction(stop, total)) for start, stop in spans]


def prefixes(file):
    return sorted({*component(file)["prefixes"].values(), "lycoris_"})


def means(name, stem):
    found = archs.get(name).resolve(stem)
    return found and (found.component, found.path, intervals(found.rows))


@pytest.mark.parametrize("file", FILES)
def test_every_module_is_named_in_both_dialects_under_every_prefix(file):
    for prefix in prefixes(file):
        for entry in component(file)["modules"]:
            piece = ("denoiser", native(entry), expected(entry))
            whole = ("denoiser", native(entry), None)
            for separator in "._":
                assert means(FILES[file], prefix + entry["diffusers"].replace(".", separator)) == piece
                assert means(FILES[file], prefix + native(entry).replace(".", separator)) == whole


@pytest.mark.parametrize("file", FILES)
def test_the_flattened_names_of_the_data_mean_the_same(file):
    for entry in component(file)["modules"]:
        # The data flatten the bare parameter with its "_weight".
        stem = entry["kohya"].removesuffix("_weight")
        assert means(FILES[file], stem) == ("denoiser", native(entry), None)
        twin = entry["kohya_diffusers"]
        assert means(FILES[file], twin) == ("denoiser", native(entry), expected(entry))


@pytest.mark.parametrize("separator", ["_", "."])
@pytest.mark.parametrize("file", FILES)
def test_spelling_is_the_inverse_of_reading(file, separator):
    arch = archs.get(FILES[file])
    for entry in component(file)["modules"]:
        twin, whole = (name.replace(".", separator) for name in (entry["diffusers"], native(entry)))
        found = arch.resolve(f"lora_unet_{twin}")
        assert arch.spell("denoiser", found.path, found.rows, DIFFUSERS, separator) == twin
        assert arch.spell("denoiser", found.path, None, NATIVE, separator) == whole


@pytest.mark.parametrize("file", FILES)
def test_the_pieces_of_a_weight_are_those_of_the_data(file):
    arch = archs.get(FILES[file])
    stated = {}
    for entry in component(file)["modules"]:
        stated.setdefault(native(entry), []).append(expected(entry))
    for path, pieces in stated.items():
        assert [intervals(rows) for rows in arch.pieces("denoiser", path, DIFFUSERS)] == pieces
        assert arch.pieces("denoiser", path, NATIVE) == (None,)
        covered = sorted(span for piece in pieces if piece for span in piece)
        assert sum(stop - start for start, stop in covered) == bool(covered)


@pytest.mark.parametrize("file", FILES)
def test_norms_and_free_parameters_are_named_too(file):
    for entry in component(file)["others"]:
        path, twin = (
            entry[side].removesuffix(".weight").removesuffix(".bias") for side in ("native", "diffusers")
        )
        for name in (component(file)["prefixes"]["diffusers"] + twin, f"diffusion_model.{path}"):
            assert means(FILES[file], name) == ("denoiser", path, None)


def shape(entry, *, whole):
    """The (out, in) widths of an entry's weight, or of the whole weight that it is a piece of."""
    stated = entry.get("native_shape", entry["shape"]) if whole else entry["shape"]
    out = entry["rows"][-1] if whole and entry["rows"] else stated[0]
    return out, stated[1]


def stems(file, dialect, prefix, separator="."):
    """The names of one dialect and the widths of their weights."""
    whole = dialect == NATIVE
    return {
        prefix + (native(entry) if whole else entry["diffusers"]).replace(".", separator): shape(
            entry, whole=whole
        )
        for entry in component(file)["modules"]
    }


SPELLINGS = [
    (NATIVE, "diffusion_model.", "."),
    (NATIVE, "lora_unet_", "_"),
    (NATIVE, "", "."),
    (DIFFUSERS, "", "."),
    (DIFFUSERS, "base_model.model.", "."),
    (DIFFUSERS, "lora_unet_", "_"),
    (DIFFUSERS, "lycoris_", "_"),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("file", FILES)
def test_a_files_own_names_tell_its_architecture(file, spelling):
    names = stems(file, *spelling)
    found = detect(names, {})
    assert (found.arch, found.candidates, found.coverage, found.notes) == (FILES[file], (), 1.0, ())
    assert set(found.resolved) == set(names)


@pytest.mark.parametrize("blocks", [("0",), ("3", "7"), None])
@pytest.mark.parametrize("dialect", [NATIVE, DIFFUSERS])
@pytest.mark.parametrize("file", ["hunyuan_dit_v1.2", "cogvideox_5b", "sana"])
def test_the_attention_of_some_blocks_is_enough(file, dialect, blocks):
    prefix = "transformer." if dialect == DIFFUSERS else "diffusion_model."
    names = {
        stem: widths
        for stem, widths in stems(file, dialect, prefix).items()
        if ".attn" in stem or ".cross_attn" in stem or ".attention." in stem
        if blocks is None or any(f".{block}." in stem for block in blocks)
    }
    assert names
    found = detect(names, {})
    assert (found.arch, found.notes) == (FILES[file], ())


def attention(width, *, cross=True, blocks=2):
    """Attention as diffusers spells it in PixArt, Sana, CogVideoX and LTX-Video."""
    return {
        f"transformer.transformer_blocks.{block}.{part}.{name}": (width, width)
        for block in range(blocks)
        for part in ("attn1", "attn2")[: 1 + cross]
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    }


@pytest.mark.parametrize(
    ("width", "cross", "arch"),
    [(2240, True, "sana"), (1920, False, "cogvideox"), (3072, False, "cogvideox")],
)
def test_sizes_tell_attention_that_is_spelt_alike(width, cross, arch):
    assert detect(attention(width, cross=cross), {}).arch == arch


def test_the_attention_of_the_smallest_sana_is_pixarts_by_name_and_shape():
    names = attention(1152)
    assert detect(names, {}).candidates == ("pixart", "sana")
    assert detect(names, {}, "Efficient-Large-Model/Sana_600M_512px_diffusers").arch == "sana"
    assert detect(names, {}, "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS").arch == "pixart"
    convolution = {"transformer.transformer_blocks.0.ff.conv_inverted": (5760, 1152)}
    assert detect({**names, **convolution}, {}).arch == "sana"
    assert detect({**names, "transformer.transformer_blocks.0.ff.net.2": (1152, 4608)}, {}).arch == "pixart"


def test_single_blocks_attention_alone_is_of_several_architectures():
    names = {
        f"transformer.single_transformer_blocks.0.attn.{name}": (3072, 3072)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert detect(names, {}).candidates == ("auraflow", "flux3")
    joint = {"transformer.joint_transformer_blocks.0.attn.to_q": (3072, 3072)}
    assert detect({**names, **joint}, {}).arch == "auraflow"
    early = {"transformer.mode_blocks.image.0.attn.to_q": (3072, 3072)}
    assert detect({**names, **early}, {}).arch == "flux3"
    last = {"transformer.single_transformer_blocks.31.attn.to_q": (3072, 3072)}
    assert detect({**names, **last}, {}).arch == "auraflow"


def test_hunyuan_dits_norms_are_exchanged_between_its_dialects():
    hunyuan = archs.get("hunyuan_dit")
    assert hunyuan.resolve("diffusion_model.blocks.3.norm2").path == "blocks.3.norm2"
    assert hunyuan.resolve("transformer.blocks.3.norm2").path == "blocks.3.norm3"
    assert hunyuan.resolve("transformer.blocks.3.norm3").path == "blocks.3.norm2"
    assert hunyuan.spell("denoiser", "blocks.3.norm2", None, DIFFUSERS) == "blocks.3.norm3"
    assert hunyuan.spell("denoiser", "blocks.3.norm3", None, DIFFUSERS) == "blocks.3.norm2"


def test_cogvideoxs_two_norms_share_one_modulation():
    cogvideox = archs.get("cogvideox")
    first, second = cogvideox.pieces("denoiser", "mixins.adaln_layer.adaLN_modulations.4.1", DIFFUSERS)
    assert intervals(first) == [(0, Fraction(1, 4)), (Fraction(1, 2), Fraction(3, 4))]
    assert intervals(second) == [(Fraction(1, 4), Fraction(1, 2)), (Fraction(3, 4), 1)]
    assert cogvideox.resolve("transformer.transformer_blocks.4.norm2.linear").rows == second


def test_auraflows_second_weights_are_the_images():
    auraflow = archs.get("auraflow")
    assert auraflow.resolve("transformer.joint_transformer_blocks.1.attn.to_q").path.endswith("attn.w2q")
    assert auraflow.resolve("transformer.joint_transformer_blocks.1.attn.add_q_proj").path.endswith(
        "attn.w1q"
    )
    assert auraflow.resolve("transformer.norm_out.linear").rows == EXCHANGED


CASCADE = "down_blocks.1.5.attention"


@pytest.mark.parametrize(
    ("stem", "path", "rows"),
    [
        (f"prior.{CASCADE}.to_k", f"{CASCADE}.attn.in_proj", THIRDS[1]),
        ("lora_prior_unet_down_blocks_1_5_attention_attn_to_k", f"{CASCADE}.attn.in_proj", THIRDS[1]),
        ("lora_prior_unet_down_blocks_1_5_attention_to_k", f"{CASCADE}.attn.in_proj", THIRDS[1]),
        ("lora_prior_unet_down_blocks_1_5_attention_attn_in_proj", f"{CASCADE}.attn.in_proj", None),
        ("lora_prior_unet_down_blocks_1_5_attention_attn_out_proj", f"{CASCADE}.attn.out_proj", None),
        (f"prior.{CASCADE}.to_out.0", f"{CASCADE}.attn.out_proj", None),
    ],
)
def test_stable_cascades_attention_has_three_spellings(stem, path, rows):
    found = archs.get("stable_cascade").resolve(stem)
    assert (found.component, found.path, found.rows) == ("denoiser", path, rows)


@pytest.mark.parametrize("layout", ["kohya", "comfy", "onetrainer"])
def test_stable_cascades_attention_is_written_as_comfyui_splits_it(layout):
    cascade = archs.get("stable_cascade")
    dialect = cascade.component("denoiser").dialect(layout, layout)
    path = f"{CASCADE}.attn.in_proj"
    assert cascade.pieces("denoiser", path, dialect) == THIRDS
    assert cascade.spell("denoiser", path, THIRDS[2], dialect) == f"{CASCADE}.attn.to_v"
    assert cascade.spell("denoiser", f"{CASCADE}.attn.out_proj", None, dialect) == f"{CASCADE}.attn.out_proj"
    assert cascade.spell("denoiser", "clf.1", None, dialect) == "clf.1"


def test_stable_cascade_as_its_trainers_write_it():
    names = {
        f"lora_prior_unet_{half}_blocks_0_{2 + 3 * block}_attention_attn_{part}": (2048, 2048)
        for half in ("down", "up")
        for block in range(3)
        for part in ("to_q", "to_k", "to_v", "out_proj")
    }
    encoder = {"lora_prior_te_text_model_encoder_layers_31_self_attn_q_proj": (1280, 1280)}
    found = detect({**names, **encoder}, {})
    assert (found.arch, found.coverage) == ("stable_cascade", 1.0)
    assert found.resolved[next(iter(encoder))].component == "text_encoder"


ENCODERS = [
    ("pixart", "lora_te1_encoder_block_3_layer_0_SelfAttention_q", "lora_te1_"),
    ("pixart", "lora_te_encoder_block_3_layer_1_DenseReluDense_wi_0", "lora_te_"),
    ("pixart", "text_encoder.encoder.block.3.layer.1.DenseReluDense.wo", "text_encoder."),
    ("sana", "lora_te_layers_7_self_attn_q_proj", "lora_te_"),
    ("sana", "text_encoder.layers.7.mlp.down_proj", "text_encoder."),
    ("hunyuan_dit", "lora_te1_encoder_layer_5_attention_self_query", "lora_te1_"),
    ("stable_cascade", "text_encoder.text_model.encoder.layers.31.mlp.fc1", "text_encoder."),
]


@pytest.mark.parametrize(("name", "stem", "prefix"), ENCODERS)
def test_text_encoders(name, stem, prefix):
    arch = archs.get(name)
    found = arch.resolve(stem)
    assert (found.component, found.prefix) == ("text_encoder", prefix)
    body = arch.spell("text_encoder", found.path, found.rows, found.dialect, found.separator)
    assert prefix + body == stem


def oracle(case):
    """The stems of a reference conversion's input and output, with their widths."""
    folder = SHARED / "oracle" / case
    if not folder.exists():
        pytest.skip(f"{case} is not among the shared data here")
    found = []
    for path in ("input/lora.safetensors", "expected/converted.safetensors"):
        data = (folder / path).read_bytes()
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        keys = {key: tensor["shape"] for key, tensor in header.items() if key.endswith(".lora_B.weight")}
        found.append({key.removesuffix(".lora_B.weight"): (shape[0], 8) for key, shape in keys.items()})
    return found


@pytest.mark.parametrize(
    ("case", "name"), [("conv__flux3_native", "flux3"), ("conv__ideogram4_ai_toolkit", "ideogram4")]
)
def test_diffusers_conversion_names_the_same_weights(case, name):
    before, after = oracle(case)
    arch = archs.get(name)
    assert detect(before, {}).arch == name
    prefix = arch.component("denoiser").prefix("diffusers")
    expected = {
        prefix + arch.spell("denoiser", found.path, rows, DIFFUSERS)
        for found in map(arch.resolve, before)
        for rows in arch.pieces("denoiser", found.path, DIFFUSERS)
    }
    assert expected == set(after)
    assert {arch.resolve(stem).path for stem in after} == {arch.resolve(stem).path for stem in before}


@pytest.mark.parametrize(
    ("name", "stem", "path", "rows"),
    [
        ("flux3", "transformer.mode_blocks.image.2.attn.to_v", "content_mode_blocks.image.2.v_proj", None),
        (
            "flux3",
            "transformer.mode_blocks.image_cond.0.ff.linear_in",
            "content_mode_blocks.image_cond.0.mlp_in",
            None,
        ),
        ("flux3", "diffusion_model.txt_mode_blocks.4.attn_out", "txt_mode_blocks.4.attn_out", None),
        ("flux3", "transformer.txt_mode_blocks.4.attn.to_out.0", "txt_mode_blocks.4.attn_out", None),
        (
            "flux3",
            "transformer.single_stream_modulations.txt.linear",
            "single_stream_modulations.txt.lin",
            None,
        ),
        ("flux3", "transformer.norm_out.linear", "final_layer.image.adaLN_modulation.1", EXCHANGED),
        ("ideogram4", "conditional_transformer.layers.33.attention.qkv", "layers.33.attention.qkv", None),
        ("ideogram4", "lora_unet_layers_33_attention_to_k", "layers.33.attention.qkv", THIRDS[1]),
        ("ideogram4", "transformer.layers.3.adaln_modulation", "layers.3.adaln_modulation", None),
    ],
)
def test_flux3_and_ideogram4(name, stem, path, rows):
    found = archs.get(name).resolve(stem)
    assert (found.component, found.path, found.rows) == ("denoiser", path, rows)


@pytest.mark.parametrize("name", ["flux3", "ideogram4"])
def test_ai_toolkit_saves_the_newest_models_in_their_own_names(name):
    denoiser = archs.get(name).component("denoiser")
    assert (denoiser.prefix("ai-toolkit"), denoiser.dialect("ai-toolkit", DIFFUSERS)) == (
        "diffusion_model.",
        NATIVE,
    )


def test_ideogram4_is_told_from_its_namesakes_by_its_width():
    assert detect({"diffusion_model.layers.3.attention.qkv": (13824, 4608)}, {}).arch == "ideogram4"
    assert detect({"transformer.layers.3.attention.to_q": (4608, 4608)}, {}).arch == "ideogram4"
    assert detect({"diffusion_model.layers.3.attention.qkv": (11520, 3840)}, {}).arch != "ideogram4"


SLIDERS = [
    ("sd15", "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 640, None),
    ("sd15", "mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 768, None),
    ("sdxl", "down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_v", 2048, None),
    ("sdxl", "up_blocks_0_attentions_2_transformer_blocks_0_attn1_to_out_0", 1280, None),
    ("flux", "transformer_blocks_0_attn_to_q", 3072, THIRDS[0]),
    ("flux", "transformer_blocks_18_attn_add_v_proj", 3072, THIRDS[2]),
    ("flux", "single_transformer_blocks_37_attn_to_k", 3072, Rows(((1, 2),), of=7)),
]


@pytest.mark.parametrize(("name", "body", "width", "rows"), SLIDERS)
def test_concept_sliders_put_kohyas_prefix_before_diffusers_names(name, body, width, rows):
    arch = archs.get(name)
    found = arch.resolve(f"lora_unet_{body}")
    assert (found.component, found.prefix, found.separator) == ("denoiser", "lora_unet_", "_")
    assert (found.rows, found.dialect) == (rows, DIFFUSERS)
    assert arch.spell("denoiser", found.path, found.rows, DIFFUSERS, "_") == body


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_concept_sliders_are_detected(name):
    names = {f"lora_unet_{body}": (width, width) for arch, body, width, _ in SLIDERS if arch == name}
    found = detect(names, {})
    assert (found.arch, found.coverage) == (name, 1.0)


def test_a_whole_concept_slider_of_flux_is_flux():
    double = ("to_q", "to_k", "to_v", "to_out_0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    names = [f"transformer_blocks_{n}_attn_{part}" for n in range(19) for part in double]
    names += [f"single_transformer_blocks_{n}_attn_{part}" for n in range(38) for part in double[:3]]
    found = detect({f"lora_unet_{name}": (3072, 3072) for name in names}, {})
    assert (found.arch, found.coverage) == ("flux", 1.0)
