"""The rows of a base weight that a module changes: whole, fused, in pieces, turned, sharded, or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import factories as make
import pytest
import torch

from loratools import archs
from loratools.errors import ShapeError, UnsupportedKindError
from loratools.io.base import keys_of
from loratools.model import Module, Rows, Target
from loratools.ops._base_weights import Weights

WIDTH = 6
QKV = "double_blocks.0.img_attn.qkv"
NORM = "final_layer.adaLN_modulation.1"
THIRDS = [Rows(((place, place + 1),), 3) for place in range(3)]


def module(path: str, rows: Rows | None = None, component: str = "denoiser", **fields: object) -> Module:
    """A module of which only the target matters."""
    return Module(Target(component, path, rows), "full", {}, **fields)  # type: ignore[arg-type]


def numbered(*shape: int) -> torch.Tensor:
    """Weights whose every value tells its place."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def single(path: Path, tensors: Mapping[str, torch.Tensor], arch: str) -> Weights:
    """A base of one file."""
    make.write_safetensors(path / "base.safetensors", dict(tensors), None)
    return Weights(keys_of(path / "base.safetensors"), arch)


def folder(path: Path, network: str, tensors: Mapping[str, torch.Tensor], arch: str) -> Weights:
    """A diffusers folder of one network."""
    stem = "model" if network.startswith("text") else "diffusion_pytorch_model"
    make.write_safetensors(path / network / f"{stem}.safetensors", dict(tensors), None)
    (path / "model_index.json").write_text("{}")
    return Weights(keys_of(path), arch)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_rows_of_a_fused_weight(prefix: str, tmp_path: Path) -> None:
    whole = numbered(3 * WIDTH, WIDTH)
    with single(tmp_path, {f"{prefix}{QKV}.weight": whole}, "flux") as weights:
        assert torch.equal(weights.of(module(QKV)), whole)
        for place, rows in enumerate(THIRDS):
            assert torch.equal(weights.of(module(QKV, rows)), whole[place * WIDTH : (place + 1) * WIDTH])
            assert weights.shape_of(module(QKV, rows)) == (WIDTH, WIDTH)


def test_halves_that_a_module_has_the_other_way_round(tmp_path: Path) -> None:
    whole = numbered(2 * WIDTH, WIDTH)
    swapped = Rows(((1, 2), (0, 1)), 2)
    with single(tmp_path, {f"{NORM}.weight": whole}, "flux") as weights:
        assert torch.equal(weights.of(module(NORM, swapped)), torch.cat([whole[WIDTH:], whole[:WIDTH]]))
    with folder(tmp_path / "d", "transformer", {"norm_out.linear.weight": whole}, "flux") as weights:
        assert torch.equal(weights.of(module(NORM, swapped)), whole)
        assert torch.equal(weights.of(module(NORM)), torch.cat([whole[WIDTH:], whole[:WIDTH]]))


def test_pieces_of_a_diffusers_folder(tmp_path: Path) -> None:
    parts = [numbered(WIDTH, WIDTH) + 1000 * place for place in range(3)]
    names = [f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"]
    with folder(tmp_path, "transformer", dict(zip(names, parts, strict=True)), "flux") as weights:
        assert torch.equal(weights.of(module(QKV)), torch.cat(parts))
        assert weights.shape_of(module(QKV)) == (3 * WIDTH, WIDTH)
        for rows, part in zip(THIRDS, parts, strict=True):
            assert torch.equal(weights.of(module(QKV, rows)), part)
        two = Rows(((2, 3), (0, 1)), 3)
        assert torch.equal(weights.of(module(QKV, two)), torch.cat([parts[2], parts[0]]))


def test_unequal_pieces(tmp_path: Path) -> None:
    """q, k, v and the MLP of Flux's single blocks: 1, 1, 1 and 4 sevenths."""
    parts = [numbered(WIDTH, WIDTH) + 1000 * place for place in range(3)] + [numbered(4 * WIDTH, WIDTH) - 1]
    stem = "single_transformer_blocks.3"
    names = [f"{stem}.attn.to_{part}.weight" for part in "qkv"] + [f"{stem}.proj_mlp.weight"]
    path = "single_blocks.3.linear1"
    with folder(tmp_path, "transformer", dict(zip(names, parts, strict=True)), "flux") as weights:
        assert torch.equal(weights.of(module(path)), torch.cat(parts))
        assert torch.equal(weights.of(module(path, Rows(((3, 7),), 7))), parts[3])
        assert weights.shape_of(module(path)) == (7 * WIDTH, WIDTH)


def test_only_the_pieces_that_a_module_changes_have_to_be_there(tmp_path: Path) -> None:
    key = numbered(WIDTH, WIDTH)
    held = {"transformer_blocks.0.attn.to_k.weight": key}
    with folder(tmp_path, "transformer", held, "flux") as weights:
        assert torch.equal(weights.of(module(QKV, THIRDS[1])), key)
        for rows in (None, THIRDS[0], Rows(((0, 2),), 3)):
            assert weights.shape_of(module(QKV, rows)) is None
            with pytest.raises(UnsupportedKindError, match="no such weight"):
                weights.of(module(QKV, rows))


@pytest.mark.parametrize("level", ["text_model.", ""])
def test_clip_as_either_release_of_transformers_writes_it(level: str, tmp_path: Path) -> None:
    query = numbered(WIDTH, WIDTH)
    held = {f"{level}encoder.layers.0.self_attn.q_proj.weight": query}
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    with folder(tmp_path, "text_encoder", held, "sd15") as weights:
        assert torch.equal(weights.of(module(path, component="text_encoder")), query)


@pytest.mark.parametrize("level", ["text_model.", ""])
def test_openclip_s_fused_parameter_and_its_pieces(level: str, tmp_path: Path) -> None:
    path = "transformer.resblocks.0.attn.in_proj"
    whole = numbered(3 * WIDTH, WIDTH)
    key = f"conditioner.embedders.1.model.{path}_weight"
    layer = f"{level}encoder.layers.0.self_attn"
    pieces = {
        f"{layer}.{name}_proj.weight": whole[place * WIDTH : (place + 1) * WIDTH]
        for place, name in enumerate("qkv")
    }
    with (
        single(tmp_path, {key: whole}, "sdxl") as one,
        folder(tmp_path / "folder", "text_encoder_2", pieces, "sdxl") as other,
    ):
        for weights in (one, other):
            for place, rows in enumerate(THIRDS):
                found = weights.of(module(path, rows, "text_encoder_2"))
                assert torch.equal(found, whole[place * WIDTH : (place + 1) * WIDTH])


@pytest.mark.parametrize(
    ("arch", "stored", "path"),
    [
        ("hunyuan_image", "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn_qkv"),
        ("hunyuan_image", "double_blocks.0.img_attn_qkv", "double_blocks.0.img_attn_qkv"),
        ("hunyuan_video15", "double_blocks.0.img_mlp.fc1", "double_blocks.0.img_mlp.0"),
    ],
)
def test_a_checkpoint_in_a_further_dialect(arch: str, stored: str, path: str, tmp_path: Path) -> None:
    assert archs.get(arch).component("denoiser").table is not None
    held = {f"model.diffusion_model.{stored}.weight": numbered(3 * WIDTH, WIDTH)}
    with single(tmp_path, held, arch) as weights:
        assert torch.equal(weights.of(module(path)), numbered(3 * WIDTH, WIDTH))


def test_pieces_of_the_original_checkpoint_of_hunyuan_video_15(tmp_path: Path) -> None:
    parts = {f"double_blocks.0.txt_attn_{part}.weight": torch.full((2, 3), ord(part)) for part in "qkv"}
    held = {name: part.to(torch.bfloat16) for name, part in parts.items()}
    with single(tmp_path, held, "hunyuan_video15") as weights:
        found = weights.of(module("double_blocks.0.txt_attn.qkv"))
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, torch.cat(list(held.values())))


@pytest.mark.parametrize(
    "fields", [{"in_first": True}, {"shape": (9, 3)}, {"in_first": True, "shape": (9, 3)}]
)
def test_gpt_2_stores_its_weights_the_other_way_round(fields: dict[str, object], tmp_path: Path) -> None:
    stored = numbered(3, 9)
    with single(tmp_path, {"transformer.h.0.attn.c_attn.weight": stored}, "llm") as weights:
        found = weights.of(module("transformer.h.0.attn.c_attn", component="language_model", **fields))
        assert torch.equal(found, stored.t())
        plain = module("transformer.h.0.attn.c_attn", component="language_model", shape=(3, 9))
        assert torch.equal(weights.of(plain), stored)


def test_a_convolution_keeps_its_kernel(tmp_path: Path) -> None:
    stored = numbered(4, 5, 3, 3)
    held = {"model.diffusion_model.input_blocks.1.0.in_layers.2.weight": stored}
    with single(tmp_path, held, "sd15") as weights:
        flattened = module("input_blocks.1.0.in_layers.2", shape=(4, 45))
        assert torch.equal(weights.of(flattened), stored)
        assert weights.shape_of(flattened) == (4, 5, 3, 3)


def test_another_height_names_both_shapes(tmp_path: Path) -> None:
    held = {f"{QKV}.weight": numbered(3 * WIDTH, WIDTH)}
    with (
        single(tmp_path, held, "flux") as weights,
        pytest.raises(ShapeError, match=r"\[12, 6\].*\[18, 6\]"),
    ):
        weights.of(module(QKV, shape=(12, 6)))


def test_rows_that_fall_on_no_share_are_refused(tmp_path: Path) -> None:
    with (
        single(tmp_path, {f"{QKV}.weight": numbered(16, 4)}, "flux") as weights,
        pytest.raises(ShapeError, match="16 rows cannot be parted into 3"),
    ):
        weights.of(module(QKV, THIRDS[0]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_a_quantised_weight_is_refused_and_tells_no_shape(dtype: torch.dtype, tmp_path: Path) -> None:
    held = {f"{QKV}.weight": torch.zeros(18, 6).to(dtype)}
    with single(tmp_path, held, "flux") as weights:
        assert weights.shape_of(module(QKV)) is None
        with pytest.raises(UnsupportedKindError, match=r"quantised.*float32") as caught:
            weights.of(module(QKV))
        assert caught.value.keys == (f"{QKV}.weight",)


def test_a_weight_that_the_base_lacks_is_named_with_the_base(tmp_path: Path) -> None:
    with (
        single(tmp_path, {f"{NORM}.weight": numbered(4, 2)}, "flux") as weights,
        pytest.raises(UnsupportedKindError, match=r"img_attn\.qkv: .*base\.safetensors has no such weight"),
    ):
        weights.of(module(QKV))


def test_shards_are_opened_once_and_closed_together(tmp_path: Path) -> None:
    shards = {f"model.layers.{n}.q.weight": f"model-{n % 2}.safetensors" for n in range(4)}
    for name in set(shards.values()):
        held = {key: torch.full((2, 2), float(key[13])) for key, file in shards.items() if file == name}
        make.write_safetensors(tmp_path / name, held, None)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with Weights(keys_of(tmp_path), "llm") as weights:
        found = [
            weights.of(module(f"model.layers.{n}.q", component="language_model")) for n in (0, 1, 2, 3, 0)
        ]
    assert [float(each[0, 0]) for each in found] == [0.0, 1.0, 2.0, 3.0, 0.0]


def test_a_base_written_anew_is_read_anew(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with single(tmp_path, {f"{QKV}.weight": torch.full((3, 2), value)}, "flux") as weights:
            assert float(weights.of(module(QKV))[0, 0]) == value
