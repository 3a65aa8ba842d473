"""Relatives of Flux.1 spell many names alike: shapes, block numbers and metadata tell them apart, or nothing does."""

import pytest

from loratools.archs import detect

# What relatives of Flux.1 have too.
FLUX_BLOCKS = [
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_single_blocks_37_linear1",
    "lora_unet_single_blocks_3_linear2",
]


def possible(detection):
    """The architectures that a file may be of."""
    return set(detection.candidates) or {detection.arch}


FLUX_SHAPES = {
    "lora_unet_double_blocks_0_img_attn_qkv": (3, 1),
    "lora_unet_double_blocks_0_txt_mlp_0": (4, 1),
    "lora_unet_single_blocks_0_linear1": (7, 1),
    "lora_unet_single_blocks_0_linear2": (1, 5),
}


@pytest.mark.parametrize("width", [16, 3072])
def test_proportions_hold_at_any_size(width):
    stems = {stem: (height * width, wide * width) for stem, (height, wide) in FLUX_SHAPES.items()}
    assert possible(detect(stems, {})) == {"chroma", "flux"}
    # Flux.2's gated MLPs have the same names in other proportions; this file has some of each.
    gated = {**stems, "lora_unet_single_blocks_0_linear1": (9 * width, width)}
    found = detect(gated, {})
    assert found.arch == "unknown"
    assert all(
        f"those of {name}, but lora_unet_" in note
        for name, note in zip(("chroma", "flux", "flux2"), found.notes, strict=True)
    )


def test_a_split_weights_pieces_have_their_share_of_the_proportion():
    stem = "transformer.single_transformer_blocks.0"
    pieces = {f"{stem}.attn.to_{part}": (16, 16) for part in "qkv"} | {f"{stem}.proj_mlp": (64, 16)}
    assert "flux" in possible(detect(pieces, {}))
    assert "flux" not in possible(detect({**pieces, f"{stem}.proj_mlp": (48, 16)}, {}))


@pytest.mark.parametrize(
    ("stems", "relative"),
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv": (3 * 6144, 6144)}, "flux2"),
        ({"lora_unet_transformer_blocks_19_attn_to_q": (3072, 3072)}, "hunyuan_video"),
        ({"lora_unet_single_transformer_blocks_38_proj_mlp": (12288, 3072)}, "hunyuan_video"),
    ],
    ids=["Flux.2's width", "FramePack's double blocks", "FramePack's single blocks"],
)
def test_relatives_under_the_same_names_are_not_flux(stems, relative):
    found = possible(detect(stems, {}))
    assert relative in found
    assert not found & {"chroma", "flux"}


def test_what_an_architecture_shares_with_one_derived_from_it_is_read_as_its_own_and_a_note_says_so():
    stems = {f"lora_unet_double_blocks_0_img_mlp_{n}": shape for n, shape in ((0, (64, 16)), (2, (16, 64)))}
    detection = detect(stems, {})
    assert (detection.arch, detection.candidates) == ("flux", ("chroma", "flux"))
    assert "chroma and flux alike" in detection.notes[0]
    assert "read as flux" in detection.notes[0]
    claimed = detect(stems, {"modelspec.architecture": "chroma/lora"})
    assert (claimed.arch, claimed.candidates, claimed.notes) == ("chroma", (), ())


def test_a_file_of_relatives_whose_shapes_are_alike_names_them_all():
    """Three architectures have it, and neither is derived from the others: nothing may be assumed."""
    detection = detect({"transformer.transformer_blocks.0.attn.to_q": (3072, 3072)}, {})
    assert detection.arch == "unknown"
    assert {"flux", "hunyuan_video", "qwen_image"} <= set(detection.candidates)
    assert all(name in detection.notes[0] for name in detection.candidates)


def test_the_number_of_blocks_tells_relatives_apart():
    def stems(double, single):
        names = [f"double_blocks_{n}_img_attn_qkv" for n in range(double)]
        names += [f"single_blocks_{n}_linear1" for n in range(single)]
        return dict.fromkeys(f"lora_unet_{name}" for name in names)

    assert possible(detect(stems(19, 38), {})) == {"chroma", "flux"}
    assert possible(detect(stems(20, 40), {})) == {"hunyuan_image", "hunyuan_video"}
    assert detect(stems(8, 48), {}).arch == "flux2"
    assert {"flux", "flux2", "hunyuan_video"} < possible(detect(stems(3, 5), {}))


def test_a_base_models_name_is_that_of_the_architecture_that_knows_most_of_it():
    stems = dict.fromkeys(FLUX_BLOCKS)
    assert detect(stems, {}, "black-forest-labs/FLUX.1-dev").arch == "flux"
    shared = dict.fromkeys(["lora_unet_double_blocks_0_img_attn_qkv"])
    assert detect(shared, {}, "black-forest-labs/FLUX.2-dev").arch == "flux2"


def test_relatives_that_share_names_are_not_mistaken() -> None:
    """Hunyuan Video's double blocks share 160 of 240 names with Flux; two thirds are not enough."""
    stems = [f"lora_unet_double_blocks_{n}_img_attn_{part}" for n in range(20) for part in ("qkv", "proj")]
    stems += [f"lora_unet_double_blocks_{n}_img_mlp_fc1" for n in range(20)]
    assert possible(detect(dict.fromkeys(stems), {})) == {"hunyuan_image", "hunyuan_video"}


@pytest.mark.parametrize(
    ("word", "relatives"),
    [
        ("distilled_guidance_layer_in_proj", {"chroma"}),
        ("double_blocks_0_img_mlp_fc1", {"hunyuan_image", "hunyuan_video"}),
    ],
)
def test_a_word_of_a_relative_says_that_the_file_is_the_relatives(word, relatives):
    stems = [*FLUX_BLOCKS, f"lora_unet_{word}"]
    assert possible(detect(dict.fromkeys(stems), {})) == relatives
