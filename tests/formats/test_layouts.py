"""Between layouts: ΔW stays, names are the other layout's own, and what has no place is refused."""

from __future__ import annotations

import json
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools.errors import LayoutError


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_kohya_to_diffusers_and_back(arch: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", arch, alpha=3.0, ranks={"attn2": 2}, alphas={"te": 5.0})
    lt.save(lt.load(made.path), tmp_path / "b.safetensors", layout="diffusers")
    tensors, metadata = make.read_safetensors(tmp_path / "b.safetensors")
    stems = {key.split(".lora_")[0] for key in tensors}
    assert stems == {weight.diffusers for weight in make.KOHYA_WEIGHTS[arch]}
    assert "lora_adapter_metadata" in metadata
    middle = lt.load(tmp_path / "b.safetensors")
    make.assert_close(make.deltas_of(middle), made.deltas)
    lt.save(middle, tmp_path / "c.safetensors", layout="kohya")
    back, _ = make.read_safetensors(tmp_path / "c.safetensors")
    assert set(back) == set(made.tensors)
    make.assert_close(make.deltas_of(lt.load(tmp_path / "c.safetensors")), made.deltas)


@pytest.mark.parametrize("generation", ["lora-updown", "attn-procs"])
def test_old_diffusers_to_kohya(generation: str, tmp_path: Path) -> None:
    made = make.diffusers(tmp_path / "a.safetensors", "sd15", generation=generation)
    lt.save(lt.load(made.path), tmp_path / "b.safetensors", layout="kohya")
    make.assert_close(make.deltas_of(lt.load(tmp_path / "b.safetensors")), made.deltas)


def test_peft_unet_to_kohya_and_diffusers(tmp_path: Path) -> None:
    paths = tuple(
        (weight.diffusers.removeprefix("unet."), weight.shape)
        for weight in make.SDXL
        if weight.component == "denoiser" and len(weight.shape) == 2
    )
    made = make.peft(tmp_path / "a", paths, alpha=2.0, rank=4)
    adapter = lt.load(made.path)
    assert adapter.arch == "sdxl"
    for layout in ("kohya", "diffusers"):
        lt.save(adapter, tmp_path / f"{layout}.safetensors", layout=layout)
        again = lt.load(tmp_path / f"{layout}.safetensors")
        assert again.layout.name == layout
        make.assert_close(make.whole(again), make.whole(adapter))


def refusal(adapter: lt.Adapter, output: Path, layout: str) -> str:
    """Why it cannot be saved in a layout, or nothing where it was."""
    try:
        lt.save(adapter, output, layout=layout)
    except LayoutError as error:
        return str(error)
    return ""


def test_fused_weights_are_never_written_under_another_dialects_prefix(tmp_path: Path) -> None:
    """diffusers has no fused qkv: either it is split, or the layout refuses; never a mixture of both names."""
    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "flux").path)
    output = tmp_path / "b.safetensors"
    reason = refusal(adapter, output, "diffusers")
    if reason:
        assert "qkv" in reason
        assert not output.exists()
    else:
        tensors, _ = make.read_safetensors(output)
        assert not [key for key in tensors if "qkv" in key or "linear1." in key or "double_blocks" in key]
        make.assert_close(make.whole(lt.load(output)), make.whole(adapter))


def test_split_weights_are_refused_or_fused_in_kohyas_layout(tmp_path: Path) -> None:
    adapter = lt.load(make.diffusers(tmp_path / "a.safetensors", "flux").path)
    output = tmp_path / "b.safetensors"
    reason = refusal(adapter, output, "kohya")
    if reason:
        assert "fused" in reason
        assert not output.exists()
    else:
        make.assert_close(make.whole(lt.load(output)), make.whole(adapter))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft", "mlx"])
def test_a_store_dtype_changes_values_only_by_rounding(layout: str, dtype: str, tmp_path: Path) -> None:
    maker = {
        "kohya": lambda: make.kohya(tmp_path / "a.safetensors"),
        "diffusers": lambda: make.diffusers(tmp_path / "a.safetensors", generation="lora-updown"),
        "peft": lambda: make.peft(tmp_path / "a", lora_bias=True),
        "mlx": lambda: make.mlx(tmp_path / "a"),
    }[layout]
    made = maker()
    adapter = lt.load(made.path)
    output = tmp_path / ("b" if made.path.is_dir() else "b.safetensors")
    lt.save(adapter, output, dtype=dtype)
    again = lt.load(output)
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}[dtype]
    assert {ref.dtype for m in again.modules.values() for ref in m.factors.values()} == {name}
    make.assert_close(make.deltas_of(again), made.deltas, make.TOLERANCE[name])
    assert set(again.modules) == set(adapter.modules)


def test_values_that_a_store_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", only=["attn1_to_q"])
    name = next(key for key in made.tensors if "lora_up" in key)
    made.tensors[name] = made.tensors[name] * 1e6
    make.write_safetensors(made.path, made.tensors, None)
    with pytest.raises(lt.LoraError, match="do not fit F16") as caught:
        lt.save(lt.load(made.path), tmp_path / "b.safetensors", dtype="float16")
    assert name in caught.value.keys
    assert not (tmp_path / "b.safetensors").exists()
    lt.save(lt.load(made.path), tmp_path / "b.safetensors", dtype="bfloat16")


def test_dora_per_output_has_each_layouts_own_shape(tmp_path: Path) -> None:
    """LyCORIS broadcasts (out, 1) over a weight, PEFT keeps (out,): a vector left as it was would scale columns."""
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", dora="out", only=["attn1_to_q"])
    lt.save(lt.load(made.path, arch="sdxl"), tmp_path / "b.safetensors", layout="diffusers")
    tensors, _ = make.read_safetensors(tmp_path / "b.safetensors")
    (name,) = (key for key in tensors if "lora_magnitude_vector" in key)
    assert tensors[name][1] == (12,)
    peft = make.diffusers(tmp_path / "c.safetensors", "sdxl", dora=True, only=["attn1.to_q"])
    lt.save(lt.load(peft.path, arch="sdxl"), tmp_path / "d.safetensors", layout="kohya")
    tensors, _ = make.read_safetensors(tmp_path / "d.safetensors")
    (name,) = (key for key in tensors if key.endswith(".dora_scale"))
    assert tensors[name][1] == (12, 1)


@pytest.mark.parametrize(("layout", "name"), [("diffusers", "b.safetensors"), ("peft", "b")])
def test_dora_per_input_has_no_place_in_pefts_spelling(layout: str, name: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sdxl", dora="in", only=["attn1_to_q"])
    with pytest.raises(LayoutError, match="attn1"):
        lt.save(lt.load(made.path, arch="sdxl"), tmp_path / name, layout=layout)


def test_a_dora_axis_is_recorded(tmp_path: Path) -> None:
    for axis in ("out", "in"):
        made = make.kohya(tmp_path / f"{axis}.safetensors", dora=axis)
        assert {module.magnitude_axis for module in lt.load(made.path).modules.values()} == {axis}
    peft = make.peft(tmp_path / "p", dora=True)
    assert {module.magnitude_axis for module in lt.load(peft.path).modules.values()} == {"out"}


def test_the_delta_of_a_dora_needs_the_base(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", dora="out")
    module = next(iter(lt.load(made.path).modules.values()))
    with pytest.raises(lt.LoraError, match="DoRA"):
        module.delta()


def test_a_peft_folder_made_from_another_layout_says_its_modules_and_scale(tmp_path: Path) -> None:
    made = make.diffusers(tmp_path / "a.safetensors", "sdxl", only=["unet."], ranks={"attn2": 2}, rank=4)
    lt.save(lt.load(made.path), tmp_path / "b", layout="peft")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text("utf-8"))
    assert config["peft_type"] == "LORA"
    assert config["r"] == 4
    assert config["lora_alpha"] == 4
    wanted = {
        weight.diffusers.removeprefix("unet.") for weight in make.SDXL if weight.component == "denoiser"
    }
    assert set(config["target_modules"]) == wanted
    make.assert_close(make.whole(lt.load(tmp_path / "b")), make.whole(lt.load(made.path)))


def test_float8_factors_are_read(tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", only=["attn1_to_q"], alpha=None)
    narrow = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in made.tensors.items()}
    make.write_safetensors(made.path, narrow, None)
    (module,) = lt.load(made.path).modules.values()
    up, down = (narrow[key].double() for key in sorted(narrow, reverse=True))
    assert torch.allclose(module.delta(), (up @ down).float())
