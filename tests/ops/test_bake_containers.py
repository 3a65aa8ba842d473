"""What a bake leaves alone, and what it must not break, in each container."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import UnsupportedKindError
from loratools.model import Adapter, Layout, Module, Target
from loratools.ops.bake import bake
from loratools.tensors import from_torch

ROWS, COLUMNS = 8, 6
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def adapter(*paths: str, size: tuple[int, int] = (ROWS, COLUMNS)) -> Adapter:
    modules = {}
    for number, path in enumerate(paths):
        generator = torch.Generator().manual_seed(number)
        shapes = {"up": (size[0], 2), "down": (2, size[1])}
        factors = {
            role: from_torch(f"{path}.{role}", torch.randn(*shape, generator=generator))
            for role, shape in shapes.items()
        }
        target = Target("model", path)
        modules[target] = Module(target, "lora", factors, 0.5, rank=2, shape=size)
    return Adapter(modules, arch="unknown", layout=Layout("kohya"))


def delta(given: Adapter, path: str) -> torch.Tensor:
    factors = given.modules[Target("model", path)].factors
    return 0.5 * factors["up"].load() @ factors["down"].load()


def weight(seed: int = 9) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_keeps_all_that_is_no_weight(zipped: bool, tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.nn.Parameter(weight(1).bfloat16()),
        "b.weight": weight(2),
        "ids": torch.arange(4),
    }
    checkpoint = {
        "state_dict": tensors,
        "global_step": 7,
        "hyper": {"x": [1, 2.5, "s", None]},
        "state": OrderedDict(k=torch.ones(2)),
    }
    torch.save(checkpoint, tmp_path / "base.ckpt", _use_new_zipfile_serialization=zipped)
    given = adapter("a", "b")

    bake(tmp_path / "base.ckpt", [given], tmp_path / "baked.ckpt")

    found = torch.load(tmp_path / "baked.ckpt", weights_only=True)
    assert list(found) == list(checkpoint)
    assert list(found["state_dict"]) == list(tensors)
    assert (found["global_step"], found["hyper"]) == (7, checkpoint["hyper"])
    assert isinstance(found["state"], OrderedDict)
    assert torch.equal(found["state_dict"]["ids"], tensors["ids"])
    assert isinstance(found["state_dict"]["a.weight"], torch.nn.Parameter)
    for key, tolerance in (("a.weight", 2**-8), ("b.weight", 1e-6)):
        wanted = tensors[key].detach().float() + delta(given, key[0])
        assert found["state_dict"][key].dtype == tensors[key].dtype
        assert torch.allclose(found["state_dict"][key].detach().float(), wanted, rtol=tolerance, atol=1e-6)


def test_a_pickle_as_safetensors_has_the_same_values(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a.weight": weight(1).half(), "b.weight": weight(2)}}, tmp_path / "base.ckpt")
    for name in ("baked.ckpt", "baked.safetensors"):
        bake(tmp_path / "base.ckpt", [adapter("a")], tmp_path / name)
    wanted = torch.load(tmp_path / "baked.ckpt", weights_only=True)["state_dict"]
    found = load_file(tmp_path / "baked.safetensors")
    assert {*found} == {*wanted}
    assert all(found[key].dtype == wanted[key].dtype for key in wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_tensor_that_is_two_keys_is_not_parted_in_silence(tmp_path: Path) -> None:
    both = weight()
    tensors = {"model.embed_tokens.weight": both, "lm_head.weight": both, "x.weight": weight(2)}
    torch.save(tensors, tmp_path / "base.bin")
    with pytest.raises(UnsupportedKindError, match="one tensor in the file"):
        bake(tmp_path / "base.bin", [adapter("lm_head")], tmp_path / "baked.bin")
    bake(tmp_path / "base.bin", [adapter("x")], tmp_path / "baked.bin")
    found = torch.load(tmp_path / "baked.bin", weights_only=True)
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize("changed", ["whole", "slice"])
def test_a_view_of_another_tensor_changes_only_where_it_is_apart(changed: str, tmp_path: Path) -> None:
    whole = weight()
    torch.save({"whole.weight": whole, "slice.weight": whole[2:5]}, tmp_path / "base.bin")
    size = (ROWS, COLUMNS) if changed == "whole" else (3, COLUMNS)
    given = adapter(changed, size=size)
    with pytest.raises(UnsupportedKindError, match="views"):
        bake(tmp_path / "base.bin", [given], tmp_path / "baked.bin")
    bake(tmp_path / "base.bin", [given], tmp_path / "baked.safetensors")
    found = load_file(tmp_path / "baked.safetensors")
    before = {"whole": whole, "slice": whole[2:5]}
    for name, old in before.items():
        wanted = old + delta(given, name) if name == changed else old
        assert torch.allclose(found[f"{name}.weight"], wanted, atol=1e-6)


@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head"])
def test_a_file_of_a_tied_model_without_its_folder_is_refused(path: str, tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": weight(), "model.layers.0.self_attn.q_proj.weight": weight(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    said = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(UnsupportedKindError, match="Give the model's folder"):
        bake(tmp_path / "model.safetensors", [adapter(path)], tmp_path / "baked.safetensors")
    # What is not tied needs no folder.
    bake(
        tmp_path / "model.safetensors",
        [adapter("model.layers.0.self_attn.q_proj")],
        tmp_path / "baked.safetensors",
    )


def test_the_output_may_be_the_base(tmp_path: Path) -> None:
    given, path = adapter("a"), tmp_path / "model.safetensors"
    save_file({"a.weight": weight(), "b.weight": weight(1)}, path)
    bake(path, [given], path, overwrite=True)
    found = load_file(path)
    assert torch.allclose(found["a.weight"], weight() + delta(given, "a"), atol=1e-6)
    assert torch.equal(found["b.weight"], weight(1))


def _scales(form: str, rows: int, columns: int) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A scale's name and values, and what each weight is multiplied by."""
    generator = torch.Generator().manual_seed(4)
    if form == "one":
        scale = torch.tensor(0.01)
        return "a.scale_weight", scale, scale.expand(rows, columns)
    if form == "rows":
        scale = 0.005 + 0.01 * torch.rand(rows, generator=generator)
        return "a.weight_scale", scale, scale[:, None].expand(rows, columns)
    scale = 0.005 + 0.01 * torch.rand(rows // 128, columns // 128, generator=generator)
    return "a.weight_scale_inv", scale, scale.repeat_interleave(128, 0).repeat_interleave(128, 1)


@pytest.mark.parametrize("form", ["one", "rows", "blocks"])
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("store", ["keep", "float32"])
def test_float8_with_scales(form: str, dtype: torch.dtype, store: str, tmp_path: Path) -> None:
    size = (256, 128)
    name, scale, spread = _scales(form, *size)
    generator = torch.Generator().manual_seed(3)
    stored = (50 * torch.randn(size, generator=generator)).clamp(-400, 400).to(dtype)
    save_file({"a.weight": stored, name: scale}, tmp_path / "base.safetensors")
    given = adapter("a", size=size)
    wanted = stored.float() * spread + delta(given, "a")

    bake(tmp_path / "base.safetensors", [given], tmp_path / "baked.safetensors", dtype=store)

    found = load_file(tmp_path / "baked.safetensors")
    if store == "float32":
        assert {*found} == {"a.weight"}
        assert torch.allclose(found["a.weight"], wanted, rtol=1e-6, atol=1e-6)
        return
    assert (found["a.weight"].dtype, found[name].shape) == (dtype, scale.shape)
    # Scales grow where the change needs it, and then each value is the nearest one that they leave.
    again = spread * (found[name] / scale).max() if form == "one" else _scales_of(found[name], form)
    nearest = (wanted / again).to(dtype).float() * again
    error = float((found["a.weight"].float() * again - wanted).norm())
    assert error <= 1.001 * float((nearest - wanted).norm())


def _scales_of(scale: torch.Tensor, form: str) -> torch.Tensor:
    return scale[:, None] if form == "rows" else scale.repeat_interleave(128, 0).repeat_interleave(128, 1)


def test_marks_of_float8_go_with_it(tmp_path: Path) -> None:
    stored = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    base = {
        "a.weight": stored,
        "a.scale_weight": torch.tensor(0.5),
        "a.scale_input": torch.tensor(1.0),
        "a.comfy_quant": torch.zeros(4, dtype=torch.uint8),
        "b.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "b.input_scale": torch.tensor(3.0),
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(base, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x", "quantization_config": {"quant_method": "fp8"}}')
    given = adapter("a", size=(64, 64))

    bake(folder, [given], tmp_path / "kept")
    assert load_file(tmp_path / "kept" / "model.safetensors").keys() == base.keys()
    assert "quantization_config" in (tmp_path / "kept" / "config.json").read_text()

    bake(folder, [given], tmp_path / "cast", dtype="bfloat16")
    found = load_file(tmp_path / "cast" / "model.safetensors")
    # What lies beside a weight that never was float8 is nobody's mark.
    assert {*found} == {"a.weight", "b.weight", "b.input_scale"}
    assert json.loads((tmp_path / "cast" / "config.json").read_text()) == {"model_type": "x"}
