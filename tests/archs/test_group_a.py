"""Stable Diffusion 3, Flux.2, Chroma, Hunyuan Video and Image, XLabs' Flux: names, rows, and telling them apart."""

import json
import struct
from fractions import Fraction
from pathlib import Path

import pytest

from loratools import archs
from loratools.archs import detect
from loratools.archs._table import DIFFUSERS, NATIVE
from loratools.model import Rows
from tests.archs.hunyuan15 import in_comfy_names, is_apart

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
NAMES = SHARED / "names"

TE = {"te1_clip_l": "text_encoder", "te2_clip_g": "text_encoder_2", "te3_t5xxl": "text_encoder_3"}
DENOISER = {"transformer": "denoiser"}
FILES = {
    "sd3_medium": ("sd3", DENOISER | TE),
    "sd35_medium": ("sd3", DENOISER | TE),
    "sd35_large": ("sd35_large", DENOISER | TE),
    "flux2_dev": ("flux2", DENOISER),
    "flux2_klein_9b": ("flux2", DENOISER),
    "flux2_klein_4b": ("flux2", DENOISER),
    "chroma": ("chroma", DENOISER | {"te_t5xxl": "text_encoder"}),
    "hunyuan_video": ("hunyuan_video", DENOISER),
    "hunyuan_video15": ("hunyuan_video15", DENOISER),
}
PARTS = [(file, part) for file, (_, parts) in FILES.items() for part in parts]
NETWORKS = {
    "sd3_medium": "sd3",
    "sd3.5_medium": "sd3",
    "sd3.5_large": "sd35_large",
    "flux_2": "flux2",
    "hunyuan_image": "hunyuan_image",
    "hunyuan_video": "hunyuan_video",
    "framepack": "hunyuan_video",
    "hunyuan_video_1_5": "hunyuan_video15",
}
SWAPPED = Rows(((1, 2), (0, 1)), of=2)


def read(name):
    path = NAMES / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not among the shared data here")
    data = json.loads(path.read_text())
    return in_comfy_names(data) if name == "hunyuan_video15" else data


def part_of(file, part):
    name, parts = FILES[file]
    return archs.get(name), parts[part], read(file)["components"][part]


def shares(rows):
    """Rows as fractions of the whole weight."""
    return rows and [(Fraction(start, rows.of), Fraction(stop, rows.of)) for start, stop in rows.spans]


def expected_shares(entry):
    if entry["swap"]:
        return shares(SWAPPED)
    if entry["rows"] is None:
        return None
    start, stop, total = entry["rows"]
    return [(Fraction(start, total), Fraction(stop, total))]


@pytest.mark.parametrize(("file", "part"), PARTS)
def test_every_module_has_its_names_and_its_rows(file, part):
    arch, component, data = part_of(file, part)
    for entry in data["modules"]:
        for separator in "._":
            body = entry["diffusers"].replace(".", separator)
            found = arch.resolve(data["prefixes"]["diffusers"] + body)
            assert (found.component, found.path) == (component, entry["native"])
            assert shares(found.rows) == expected_shares(entry)
            assert arch.spell(component, found.path, found.rows, DIFFUSERS, separator) == body
            body = entry["native"].replace(".", separator)
            whole = arch.resolve(data["prefixes"]["native"] + body)
            assert (whole.component, whole.path, whole.rows) == (component, entry["native"], None)
            assert arch.spell(component, whole.path, None, NATIVE, separator) == body


@pytest.mark.parametrize(("file", "part"), PARTS)
def test_kohya_files_spell_every_module_as_trainers_do(file, part):
    arch, component, data = part_of(file, part)
    row = arch.component(component)
    for entry in data["modules"]:
        found = arch.resolve(entry["kohya"])
        assert (found.component, found.path) == (component, entry["native"])
        # Only Hunyuan Video 1.5's trainers have q, k and v of the streams apart.
        assert shares(found.rows) == (expected_shares(entry) if is_apart(entry.get("original", "")) else None)
        spelt = arch.spell(component, found.path, found.rows, row.kohya_dialect, "_")
        assert row.prefix("kohya") + spelt == entry["kohya"]


@pytest.mark.parametrize(("file", "part"), PARTS)
def test_every_prefix_marks_its_component(file, part):
    arch, component, data = part_of(file, part)
    entry = data["modules"][-1]
    for layout, prefix in data["prefixes"].items():
        # PEFT's prefix says nothing of the encoder, and both CLIPs have the same names.
        if layout == "peft" and component == "text_encoder_2":
            continue
        for body in (entry["native"], entry["diffusers"]):
            assert arch.resolve(prefix + body).component == component, (layout, prefix)


@pytest.mark.parametrize(("file", "part"), PARTS)
def test_norms_and_free_parameters_have_rows_too(file, part):
    arch, component, data = part_of(file, part)
    for entry in data.get("others", ()):
        if entry["native"].endswith(".bias"):
            continue
        path, twin = (
            entry[side].removesuffix(".weight").removesuffix(".scale") for side in ("native", "diffusers")
        )
        found = arch.resolve(data["prefixes"]["diffusers"] + twin)
        assert (found.component, found.path, found.rows) == (component, path, None)


@pytest.mark.parametrize(("file", "part"), PARTS)
def test_the_pieces_that_diffusers_has_make_up_each_weight(file, part):
    arch, component, data = part_of(file, part)
    named = {}
    for entry in data["modules"]:
        named.setdefault(entry["native"], set()).add(
            arch.resolve(data["prefixes"]["diffusers"] + entry["diffusers"]).rows
        )
    for path, rows in named.items():
        assert set(arch.pieces(component, path, DIFFUSERS)) == rows


def shaped(data, prefix, side, separator):
    """The denoiser's names in a dialect with their weights' (out, in) shapes."""
    found = {}
    for entry in data["modules"]:
        shape = entry["shape"]
        out = entry["rows"][2] if side == "native" and entry["rows"] else shape[0]
        found[prefix + entry[side].replace(".", separator)] = (out, shape[1])
    return found


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("layout", "side", "separator"),
    [
        ("kohya", "native", "_"),
        ("comfy", "native", "."),
        ("diffusers", "diffusers", "."),
        ("peft", "diffusers", "."),
        ("onetrainer", "diffusers", "_"),
        ("lycoris", "diffusers", "_"),
    ],
)
def test_a_files_own_names_and_shapes_are_detected(file, layout, side, separator):
    arch, _, data = part_of(file, "transformer")
    stems = shaped(data, arch.components[0].prefix(layout), side, separator)
    detection = detect(stems, {})
    assert (detection.arch, detection.coverage, detection.notes) == (arch.name, 1.0, ())
    assert set(detection.resolved) == set(stems)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_trainers_network_is_detected_and_spelt_again(network):
    modules = read("kohya_layouts")[network]
    arch = archs.get(NETWORKS[network])
    detection = detect({stem: (shape[0], shape[1]) for stem, shape in modules.items()}, {})
    assert (detection.arch, detection.coverage, detection.notes) == (arch.name, 1.0, ())
    assert len({(each.component, each.path, each.rows) for each in detection.resolved.values()}) == len(
        modules
    )
    for stem, each in detection.resolved.items():
        body = arch.spell(each.component, each.path, each.rows, each.dialect, each.separator)
        assert each.prefix + body == stem


def attention(file):
    """What most adapters of a file's model train: the attention of its first five blocks, in diffusers' names."""
    _, _, data = part_of(file, "transformer")
    block = ("transformer_blocks.", "single_transformer_blocks.")
    return {
        f"transformer.{entry['diffusers']}": tuple(entry["shape"])
        for entry in data["modules"]
        if entry["diffusers"].startswith(block)
        and ".attn.to_" in entry["diffusers"]
        and int(entry["diffusers"].split(".")[1]) < 5
    }


@pytest.mark.parametrize("file", ["sd3_medium", "sd35_medium", "sd35_large", "flux2_dev", "hunyuan_video15"])
def test_widths_tell_the_attention_of_a_few_blocks(file):
    assert detect(attention(file), {}).arch == FILES[file][0]


def test_the_version_in_kohyas_metadata_tells_chroma_from_flux():
    modules = read("kohya_layouts")["flux_kontext"]
    stems = {stem: (shape[0], shape[1]) for stem, shape in modules.items()}
    assert detect(stems, {"ss_base_model_version": "chroma"}).arch == "chroma"
    assert detect(stems, {"modelspec.architecture": "chroma/lora"}).arch == "chroma"
    assert detect(stems, {"ss_base_model_version": "flux1"}).arch == "flux"


def test_a_chroma_is_one_by_its_guidance_layer_and_a_flux_by_its_modulations():
    block = "diffusion_model.double_blocks.0.img_attn.qkv"
    chroma = "diffusion_model.distilled_guidance_layer.layers.0.in_layer"
    assert detect({block: (9216, 3072), chroma: (5120, 5120)}, {}).arch == "chroma"
    modulation = "diffusion_model.double_blocks.0.img_mod.lin"
    assert detect({block: (9216, 3072), modulation: (18432, 3072)}, {}).arch == "flux"


@pytest.mark.parametrize(
    ("stem", "shape", "arch"),
    [
        ("lora_unet_single_blocks_0_linear1", (21504, 3072), "flux"),
        ("lora_unet_single_blocks_0_linear1", (27648, 3072), "flux2"),
        ("lora_unet_single_blocks_0_linear1", (25088, 3584), "hunyuan_image"),
        ("lora_unet_double_blocks_0_img_mlp_fc1", (14336, 3584), "hunyuan_image"),
    ],
)
def test_fused_weights_of_the_same_name_are_told_by_their_shapes(stem, shape, arch):
    known = dict.fromkeys(archs.all_archs())
    fitting = [
        name
        for name in known
        if archs.get(name).has_table
        and (meaning := archs.get(name).resolve(stem)) is not None
        and not archs.get(name).denies(meaning, shape)
    ]
    assert arch in fitting
    assert {"flux2", "hunyuan_image"}.isdisjoint(set(fitting) - {arch})


@pytest.mark.parametrize(("arch", "last"), [("sd3", 23), ("sd35_large", 37)])
def test_the_last_text_norm_of_stable_diffusion_3_is_stored_the_other_way_round(arch, last):
    arch = archs.get(arch)
    for block in (0, 12, last - 1, last):
        path = f"joint_blocks.{block}.context_block.adaLN_modulation.1"
        rows = SWAPPED if block == last else None
        assert arch.pieces("denoiser", path, DIFFUSERS) == (rows,)
        found = arch.resolve(f"transformer.transformer_blocks.{block}.norm1_context.linear")
        assert (found.path, found.rows) == (path, rows)


def test_framepacks_kohya_names_are_those_of_diffusers():
    found = archs.get("hunyuan_video").resolve("lora_unet_single_transformer_blocks_39_proj_mlp")
    assert (found.path, found.dialect) == ("single_blocks.39.linear1", DIFFUSERS)
    assert found.rows == Rows(((3, 7),), of=7)


@pytest.mark.parametrize(
    ("twin", "path", "rows"),
    [
        ("transformer_blocks.3.attn.to_k", "double_blocks.3.img_attn_qkv", Rows(((1, 2),), of=3)),
        ("transformer_blocks.3.ff_context.net.2", "double_blocks.3.txt_mlp.fc2", None),
        ("single_transformer_blocks.39.proj_mlp", "single_blocks.39.linear1", Rows(((3, 7),), of=7)),
        ("time_guidance_embed.timestep_embedder_r.linear_1", "time_r_in.mlp.0", None),
        ("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.mlp.2", None),
        ("context_embedder_2.linear_3", "byt5_in.fc3", None),
        (
            "context_embedder.token_refiner.refiner_blocks.1.norm_out.linear",
            "txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1",
            None,
        ),
        ("norm_out.linear", "final_layer.adaLN_modulation.1", SWAPPED),
    ],
)
def test_hunyuan_image_in_diffusers_names(twin, path, rows):
    found = archs.get("hunyuan_image").resolve(f"transformer.{twin}")
    assert (found.path, found.rows) == (path, rows)


def stems_of(path):
    """The names in a file, without their factors' suffixes."""
    if not path.exists():
        pytest.skip(f"{path.parts[-3]} is not among the shared data here")
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    marks = (".lora_B.weight", ".lora_up.weight")
    return {key.removesuffix(mark) for key in header for mark in marks if key.endswith(mark)}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("conv__flux2_kohya", "flux2"),
        ("conv__flux2_peft", "flux2"),
        ("conv__hunyuan_video_native", "hunyuan_video"),
    ],
)
def test_diffusers_names_the_same_weights(case, name):
    arch = archs.get(name)
    folder = SHARED / "oracle" / case
    # diffusers' converter takes this for a linear layer; in the model it is img_in.proj.
    before = stems_of(folder / "input" / "lora.safetensors") - {"diffusion_model.img_in"}
    after = stems_of(folder / "expected" / "converted.safetensors")
    expected = {
        "transformer." + arch.spell("denoiser", found.path, rows, DIFFUSERS)
        for found in map(arch.resolve, before)
        for rows in arch.pieces("denoiser", found.path, DIFFUSERS)
    }
    assert expected == (after - {"transformer.x_embedder"} if name == "hunyuan_video" else after)


@pytest.mark.peers
def test_every_weight_of_diffusers_hunyuan_image_has_a_row_and_every_row_a_weight():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.device("meta"):
        model = diffusers.HunyuanImageTransformer2DModel(
            num_layers=2, num_single_layers=2, guidance_embeds=True, use_meanflow=True, text_embed_2_dim=1472
        )
    names = {key.rpartition(".")[0] for key in model.state_dict()}
    arch = archs.get("hunyuan_image")
    found = {name: arch.resolve(f"transformer.{name}") for name in names}
    assert [name for name, each in found.items() if each is None] == []
    table = arch.components[0].table
    spelt = {
        name.text.replace("%s", block)
        for texts in table.spellings(DIFFUSERS).values()
        for name in texts
        for block in "01"
    }
    assert spelt == names


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("qkv_lora1", "img_attn.qkv"),
        ("qkv_lora2", "txt_attn.qkv"),
        ("proj_lora1", "img_attn.proj"),
        ("proj_lora2", "txt_attn.proj"),
        ("proj_lora", "linear2"),
    ],
)
def test_xlabs_attention_processors(prefix, name, path):
    flux = archs.get("flux")
    blocks = "single_blocks.18" if name == "proj_lora" else "double_blocks.18"
    stem = f"{blocks}.processor.{name}"
    found = flux.resolve(prefix + stem)
    assert (found.path, found.rows, found.dialect) == (f"{blocks}.{path}", None, "xlabs")
    assert flux.spell("denoiser", found.path, None, "xlabs") == stem
    assert flux.components[0].dialect("xlabs", DIFFUSERS) == "xlabs"
    assert flux.components[0].prefix("xlabs") == ""


def test_an_xlabs_file_is_flux():
    stems = [
        f"double_blocks.{block}.processor.{name}"
        for block in range(19)
        for name in ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2")
    ]
    detection = detect(dict.fromkeys(stems), {})
    assert (detection.arch, detection.coverage) == ("flux", 1.0)


@pytest.mark.parametrize(
    ("arch", "layout", "dialect"),
    [
        ("flux", "ai-toolkit", DIFFUSERS),
        ("sd3", "ai-toolkit", DIFFUSERS),
        ("flux2", "ai-toolkit", NATIVE),
        ("chroma", "ai-toolkit", NATIVE),
        ("hunyuan_video", "musubi", NATIVE),
        ("flux2", "lycoris", DIFFUSERS),
    ],
)
def test_the_dialects_that_layouts_use(arch, layout, dialect):
    usual = {"ai-toolkit": DIFFUSERS, "lycoris": DIFFUSERS, "musubi": "kohya"}[layout]
    assert archs.get(arch).components[0].dialect(layout, usual) == dialect


@pytest.mark.parametrize("separator", [".", "_"])
def test_hunyuan_video_15_in_the_originals_names(separator):
    arch, component, data = part_of("hunyuan_video15", "transformer")
    for entry in data["modules"]:
        body = entry["original"].replace(".", separator)
        for prefix in ("", "diffusion_model.", "lora_unet_"):
            found = arch.resolve(prefix + body, "original")
            assert (found.component, found.path) == (component, entry["native"])
            whole = entry["rows"] is not None and not is_apart(entry["original"])
            assert shares(found.rows) == (None if whole or entry["swap"] else expected_shares(entry))
        assert arch.spell(component, found.path, found.rows, "original", separator) == body


HUNYUAN_IMAGE = [
    ("double_blocks.3.img_attn_qkv", "double_blocks.3.img_attn.qkv"),
    ("double_blocks.3.txt_attn_proj", "double_blocks.3.txt_attn.proj"),
    ("double_blocks.3.img_mlp.fc1", "double_blocks.3.img_mlp.0"),
    ("double_blocks.3.txt_mlp.fc2", "double_blocks.3.txt_mlp.2"),
    ("double_blocks.3.img_mod.linear", "double_blocks.3.img_mod.lin"),
    ("double_blocks.3.img_attn_q_norm", "double_blocks.3.img_attn.norm.query_norm"),
    ("single_blocks.39.linear1", "single_blocks.39.linear1"),
    ("single_blocks.39.modulation.linear", "single_blocks.39.modulation.lin"),
    (
        "txt_in.individual_token_refiner.blocks.1.self_attn_qkv",
        "txt_in.individual_token_refiner.blocks.1.self_attn.qkv",
    ),
    ("time_r_in.mlp.2", "time_r_in.out_layer"),
    ("byt5_in.fc3", "byt5_in.fc3"),
]


@pytest.mark.parametrize(("own", "comfy"), HUNYUAN_IMAGE)
def test_hunyuan_image_has_fluxs_names_in_comfyui_and_its_own_elsewhere(own, comfy):
    arch = archs.get("hunyuan_image")
    denoiser = arch.components[0]
    assert denoiser.dialect("comfy", NATIVE) == "comfy"
    assert arch.spell("denoiser", own, None, "comfy") == comfy
    assert arch.spell("denoiser", own, None, NATIVE) == own
    for body in (own, comfy):
        for prefix in ("diffusion_model.", "lora_unet_", ""):
            found = arch.resolve(prefix + body)
            assert (found.path, found.rows) == (own, None)
            assert arch.spell("denoiser", found.path, None, found.dialect) == body
        flat = arch.resolve("lora_unet_" + body.replace(".", "_"))
        assert (flat.path, flat.separator) == (own, "_" if "." in body else flat.separator)


@pytest.mark.parametrize(("width", "name"), [(3584, "hunyuan_image"), (2048, "hunyuan_video15")])
def test_relatives_in_comfyuis_names_are_told_from_flux_by_their_widths(width, name):
    shapes = {
        "double_blocks.0.img_attn.qkv": (3, 1),
        "double_blocks.0.txt_attn.proj": (1, 1),
        "double_blocks.1.img_mlp.0": (4, 1),
    }

    def found(size):
        return detect({f"diffusion_model.{n}": (h * size, w * size) for n, (h, w) in shapes.items()}, {})

    assert (found(width).arch, found(width).candidates) == (name, ())
    # Without a width that says so, the names are those of Flux.1 and what was derived from it.
    assert set(found(16).candidates) == {"chroma", "flux"}
    assert found(3072).arch == "flux"
