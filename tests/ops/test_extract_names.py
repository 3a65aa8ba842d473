"""Every architecture's weights come back under their names, however either checkpoint spells, fuses and packs them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratools as lt
from loratools import archs
from loratools.archs._table import Component
from loratools.errors import LayoutError
from loratools.ops.bake import bake
from loratools.ops.extract import extract
from loratools.ops.verify import verify
from tests.ops import bases as tables
from tests.ops import checkpoints as make

WIDTH = 6
# Weights of a table that takes long.
MANY = 100
Values = dict[str, torch.Tensor]


def planted(row: Component, seed: int, rank: int | None = None) -> Values:
    """A matrix for every weight of a component's table, by native path; a product of a rank where one is given."""
    found: Values = {}
    for named in tables.weights_of(row):
        own = zlib.crc32(named.path.encode()) + seed
        shape = (named.height, WIDTH)
        found[named.path] = make.random(shape, own) if rank is None else make.low_rank(shape, rank, own, 1.0)
    return found


def state(row: Component, dialect: str, values: Values, prefix: str) -> make.State:
    """The weights as a checkpoint of a dialect stores them."""
    found: make.State = {}
    for name, (named, rows) in tables.spelt(row, dialect).items():
        leaf = "_weight" if name.endswith("in_proj") else ".weight"
        found[f"{prefix}{name}{leaf}"] = values[named.path][tables.rows_of(named, rows)]
    return found


def checkpoints(row: Component, values: Values, folder: Path) -> Iterator[Path]:
    """A file for each dialect with each kind of prefix, and a folder of diffusers."""
    for dialect in tables.dialects(row):
        if not tables.spelt(row, dialect):
            continue
        for layout in ("checkpoint", "comfy"):
            for prefix in row.prefixes.get(layout, ())[:1]:
                named = state(row, dialect, values, prefix)
                yield make.save(named, folder / f"{dialect}-{layout}.safetensors")
        for prefix in row.prefixes.get("diffusers", ())[:1]:
            inside = folder / dialect / prefix.rstrip(".")
            inside.mkdir(parents=True)
            (folder / dialect / "model_index.json").write_text("{}")
            make.save(state(row, dialect, values, ""), inside / "diffusion_pytorch_model.safetensors")
            yield folder / dialect


@pytest.mark.parametrize(("arch", "component"), tables.tabled())
def test_any_spelling_against_any_other(arch: str, component: str, tmp_path: Path) -> None:
    """Each way to store the base, against the next way to store the tuned ones; of a UNet the two furthest apart."""
    row = archs.get(arch).component(component)
    before, change = planted(row, 0), planted(row, 1, 1)
    after = {path: value + change[path] for path, value in before.items()}
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    bases = list(checkpoints(row, before, tmp_path / "before"))
    tuned = list(checkpoints(row, after, tmp_path / "after"))
    heights = {named.path: named for named in tables.weights_of(row)}
    every = range(len(bases)) if len(before) < MANY else (0, len(bases) - 1)
    for at in every:
        base, other = bases[at], tuned[(at + 1) % len(tuned)] if len(before) < MANY else tuned[-1 - at]
        asked = {"arch": arch, "rank": WIDTH, "dtype": "float32", "embeddings": True, "full_small": True}
        found, report = extract(base, other, threads=1, to="lycoris", **asked)
        assert found is not None
        assert not report.left_out, (base, other)
        covered = dict.fromkeys(heights, 0)
        for target, module in found.modules.items():
            named = heights[target.path]
            wanted = change[target.path][tables.rows_of(named, target.rows)]
            delta = module.delta()
            delta = delta if delta.shape == wanted.shape else delta.t()
            assert torch.allclose(delta, wanted, atol=1e-4), (base, other, target)
            covered[target.path] += len(wanted)
        assert covered == {path: named.height for path, named in heights.items()}


def openclip() -> tuple[make.State, make.State]:
    """A text encoder of one layer in OpenCLIP's names and in Hugging Face's: the same numbers."""
    layer, twin = "transformer.resblocks.0.", "text_model.encoder.layers.0."
    parts = {name: make.random((8, 8), at) for at, name in enumerate("qkv")}
    biases = {name: make.random((8,), 10 + at) for at, name in enumerate("qkv")}
    out, projection = make.random((8, 8), 5), make.random((8, 8), 6)
    original = {
        layer + "attn.in_proj_weight": torch.cat([*parts.values()]),
        layer + "attn.in_proj_bias": torch.cat([*biases.values()]),
        layer + "attn.out_proj.weight": out,
        "text_projection": projection,
    }
    other = {
        **{f"{twin}self_attn.{name}_proj.weight": value for name, value in parts.items()},
        **{f"{twin}self_attn.{name}_proj.bias": value for name, value in biases.items()},
        twin + "self_attn.out_proj.weight": out,
        "text_projection.weight": projection.t(),
    }
    return original, other


def sdxl_pair(tmp_path: Path) -> tuple[Path, Path, Path, torch.Tensor]:
    """One model as a single file and as a folder, a tuned folder, and what was added to its text projection."""
    original, other = openclip()
    name = "text_projection.weight"
    change = make.low_rank((8, 8), 2, 70)
    tuned = {**other, name: other[name] + change}
    prefix = "conditioner.embedders.1.model."
    unet = {"conv_in.weight": make.random((8, 4, 3, 3), 9), "conv_out.weight": make.random((4, 8, 3, 3), 8)}
    native = {
        "model.diffusion_model.input_blocks.0.0.weight": unet["conv_in.weight"],
        "model.diffusion_model.out.2.weight": unet["conv_out.weight"],
        **{prefix + key: value for key, value in original.items()},
    }
    single = make.save(native, tmp_path / "single.safetensors")
    folders = []
    for word, encoder in (("base", other), ("tuned", tuned)):
        for part, values in (("unet", unet), ("text_encoder_2", encoder)):
            (tmp_path / word / part).mkdir(parents=True)
            make.save(values, tmp_path / word / part / "model.safetensors")
        (tmp_path / word / "model_index.json").write_text("{}")
        folders.append(tmp_path / word)
    return single, *folders, change


def test_openclips_projection_is_stored_the_other_way_round(tmp_path: Path) -> None:
    """A bare parameter (in, out) in OpenCLIP's names is a linear layer's weight (out, in) in Hugging Face's."""
    single, folder, tuned, change = sdxl_pair(tmp_path)
    for base in (single, folder):
        found, report = extract(base, tuned, rank=2, arch="sdxl", dtype="float32")
        assert found is not None
        ((target, module),) = found.modules.items()
        assert (target.component, target.path) == ("text_encoder_2", "text_projection")
        assert torch.allclose(module.delta(), change, atol=1e-5)
        assert not report.left_out
    output, baked = tmp_path / "lora.safetensors", tmp_path / "baked.safetensors"
    extract(single, tuned, output, rank=2, arch="sdxl", dtype="float32")
    bake(single, [output], baked, arch="sdxl")
    assert verify(single, [output], baked, arch="sdxl").ok
    _, report = extract(baked, tuned, rank=1, arch="sdxl", exclude=["nothing"])
    assert max(module.norm for module in report.modules) < 1e-5


def test_whole_tensors_of_an_image_model_are_not_written_under_names_that_peft_has_not(
    tmp_path: Path,
) -> None:
    """PEFT's layout has diffusers' names of modules: a norm under its original name would be loaded by nobody."""
    stem = "double_blocks.0.img_attn."
    base = {stem + "proj.weight": make.random((8, 8), 1), stem + "norm.query_norm.scale": torch.ones(4)}
    tuned = {key: value + 1 for key, value in base.items()}
    paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")
    with pytest.raises(LayoutError, match="query_norm"):
        extract(*paths, tmp_path / "out", rank=1, arch="flux", to="peft", full_small=True)
    assert not (tmp_path / "out").exists()
    extract(*paths, tmp_path / "o.safetensors", rank=1, arch="flux", to="comfy", full_small=True)
    kinds = {
        target.path: module.kind for target, module in lt.load(tmp_path / "o.safetensors").modules.items()
    }
    assert kinds == {stem + "proj": "lora", stem + "norm.query_norm": "full"}


def test_peft_gets_biases_of_modules_with_and_without_factors(tmp_path: Path) -> None:
    """Whole, so that it can merge them: what is added beside factors needs a bias in all of the modules."""
    base = make.llama()
    base["model.layers.0.mlp.up_proj.bias"] = make.random((64,), 30)
    tuned = {key: value + 1 if key.endswith("bias") else value for key, value in base.items()}
    key = "model.layers.0.self_attn.k_proj.weight"
    tuned[key] = base[key] + make.low_rank((12, 24), 1, 5)
    name = "model.embed_tokens.weight"
    tuned[name] = base[name] + make.low_rank((50, 24), 1, 6)
    paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")
    extract(*paths, tmp_path / "out", rank=1, full_small=True, embeddings=True, dtype="float32")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["bias"] == "all"
    assert not config.get("lora_bias")
    extras = {name.removeprefix("base_model.model.") for name in lt.load(tmp_path / "out").extras}
    assert extras == {
        "model.layers.0.self_attn.k_proj.base_layer.bias",
        "model.layers.0.mlp.up_proj.bias",
    }
    bake(paths[0], [tmp_path / "out"], tmp_path / "c.safetensors")
    for name, value in load_file(tmp_path / "c.safetensors").items():
        assert torch.allclose(value, tuned[name], atol=1e-5), name


@pytest.mark.parametrize("small", [True, False])
def test_biases_of_a_fused_weight_that_is_stored_in_parts(small: bool, tmp_path: Path) -> None:
    fused, parts = "double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_"
    weight, bias = make.random((24, 8), 1), make.random((24,), 2)
    base = {f"{fused}.weight": weight, f"{fused}.bias": bias}
    change = make.low_rank((24, 8), 2, 3)
    tuned = {}
    for at, name in enumerate("qkv"):
        rows = slice(8 * at, 8 * at + 8)
        tuned[f"{parts}{name}.weight"] = (weight + change)[rows]
        tuned[f"{parts}{name}.bias"] = bias[rows] + at
    paths = make.save(base, tmp_path / "a.safetensors"), make.save(tuned, tmp_path / "b.safetensors")
    found, report = extract(*paths, rank=2, arch="flux", dtype="float32", full_small=small, to="comfy")
    assert found is not None
    (module,) = found.modules.values()
    assert torch.allclose(module.delta(), change, atol=1e-5)
    if small:
        wanted = torch.repeat_interleave(torch.arange(3.0), 8)
        assert torch.allclose(module.factors["diff_b"].load(), wanted, atol=1e-5)
    else:
        assert [each.norm for each in report.left_out] == [pytest.approx(40**0.5, rel=1e-5)]


@pytest.mark.parametrize("packed", ["base", "tuned"])
def test_scaled_float8_of_every_shape(packed: str, tmp_path: Path) -> None:
    values = {"conv.weight": make.random((8, 4, 3, 3), 1), "linear.weight": make.random((12, 9), 2)}
    stored: make.State = {}
    dense: make.State = {}
    for key, value in values.items():
        scale = value.abs().max() / 448
        stored[key] = (value / scale).to(torch.float8_e4m3fn)
        stored[key.replace(".weight", ".scale_weight")] = scale
        dense[key] = stored[key].float() * scale
    plain = {key: value + make.low_rank(tuple(value.shape), 1, 9) for key, value in dense.items()}
    paths = [make.save(stored, tmp_path / "a.safetensors"), make.save(plain, tmp_path / "b.safetensors")]
    sign = 1 if packed == "base" else -1
    found, report = extract(*paths[::sign], rank=1, dtype="float32")
    assert found is not None
    assert not report.left_out
    for target, module in found.modules.items():
        wanted = sign * (plain[f"{target.path}.weight"] - dense[f"{target.path}.weight"])
        assert torch.allclose(module.delta().reshape(wanted.shape), wanted, atol=1e-5)
