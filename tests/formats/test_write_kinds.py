"""What layouts hold of a module: LyCORIS' kinds, alpha as it was stated, DoRA in each layout's shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools import formats
from loratools.errors import LayoutError
from loratools.model import Adapter, Layout
from loratools.ops import files
from loratools.tensors import TensorRef, from_torch

LYCORIS = ("kohya", "lycoris", "onetrainer", "comfy")
KINDS = ("loha", "lokr", "lokr_full", "oft", "glora", "full", "ia3")


def written(adapter: Adapter, layout: str) -> dict[str, TensorRef]:
    """The tensors of the adapter named anew."""
    form = formats.get(layout)
    document = formats.document(replace(adapter, order=()), Layout(layout), form)
    return {ref.name: ref for ref in document.tensors}


def content(refs: dict[str, TensorRef]) -> list[tuple[str, tuple[int, ...], bytes]]:
    """What tensors hold, whatever they are called."""
    return sorted((ref.dtype, ref.shape, bytes(ref.raw())) for ref in refs.values())


@pytest.mark.parametrize("layout", LYCORIS)
@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_kinds_go_over_bit_by_bit(kind: str, layout: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", kind=kind, dtype=torch.float16)
    # Factors whose shapes do not tell the width of attn2.to_k leave three architectures to choose from.
    adapter = files.read(made.path, arch="sd15")
    there = written(adapter, layout)
    assert content(there) == content({key: from_torch(key, value) for key, value in made.tensors.items()})
    again = formats.read(there, arch="sd15")
    assert again.kinds == adapter.kinds
    assert {t: (m.scale, m.rank, m.alpha) for t, m in again.modules.items()} == {
        t: (m.scale, m.rank, m.alpha) for t, m in adapter.modules.items()
    }


@pytest.mark.parametrize("layout", LYCORIS)
@pytest.mark.parametrize(
    "more",
    [
        {"diff_b": (12,)},
        {"bias_indices": (2, 3), "bias_values": (3,), "bias_size": (2,)},
        {"scalar": ()},
    ],
    ids=["bias", "sparse", "scalar"],
)
def test_what_lies_beside_the_factors_goes_with_them(
    more: dict[str, tuple[int, ...]], layout: str, tmp_path: Path
) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", only=["attn1_to_out"])
    stem = next(iter(made.tensors)).partition(".")[0]
    beside = {f"{stem}.{suffix}": torch.full(shape, 3.0) for suffix, shape in more.items()}
    make.write_safetensors(made.path, {**made.tensors, **beside}, None)
    adapter = lt.load(made.path, arch="sd15")
    there = written(adapter, layout)
    assert {name.rpartition(".")[2] for name in there} >= more.keys()
    again = formats.read(there, arch="sd15")
    assert [module.scale for module in again.modules.values()] == [m.scale for m in adapter.modules.values()]


@pytest.mark.parametrize("layout", LYCORIS)
def test_a_tucker_core_is_spelt_as_its_readers_know_it(layout: str, tmp_path: Path) -> None:
    """ComfyUI looks for a core beside lora_up alone."""
    made = make.kohya(tmp_path / "a.safetensors", "sd15", mid=True)
    there = written(lt.load(made.path), layout)
    cores = [name.removesuffix(".lora_mid.weight") for name in there if name.endswith(".lora_mid.weight")]
    assert len(cores) == 2
    assert all({f"{stem}.lora_up.weight", f"{stem}.lora_down.weight"} <= there.keys() for stem in cores)
    make.assert_close(make.deltas_of(formats.read(there)), made.deltas)


@pytest.mark.parametrize("kind", ["loha", "oft", "glora", "full"])
@pytest.mark.parametrize("layout", ["diffusers", "peft", "ai-toolkit"])
def test_layouts_without_names_for_a_kind_refuse_it(layout: str, kind: str, tmp_path: Path) -> None:
    adapter = lt.load(
        make.kohya(tmp_path / "a.safetensors", "sd15", kind=kind, only=["attn1_to_q"]).path, arch="sd15"
    )
    with pytest.raises(LayoutError, match=f"cannot hold .*{kind}"):
        written(adapter, layout)
    (module,) = list(adapter.modules.values())[:1]
    # PEFT has names for its own LoHa, and no true configuration for one that others have trained.
    names = (layout, kind) == ("peft", "loha")
    assert bool(formats.get(layout).lacking(module)) is not names


@pytest.mark.parametrize(
    "layout", ["kohya", "lycoris", "onetrainer", "comfy", "ai-toolkit", "diffusers", "peft"]
)
def test_stacked_experts_are_not_taken_for_factors(layout: str) -> None:
    tensors = {
        "base_model.model.model.layers.0.mlp.experts.lora_A.weight": torch.ones(4, 2, 8),
        "base_model.model.model.layers.0.mlp.experts.lora_B.weight": torch.ones(4, 8, 2),
    }
    refs = {name: from_torch(name, tensor) for name, tensor in tensors.items()}
    adapter = formats.read(refs, config={"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    assert adapter.kinds == {"experts": 1}
    with pytest.raises(LayoutError):
        written(adapter, layout)


@pytest.mark.parametrize("layout", LYCORIS)
@pytest.mark.parametrize(
    "like",
    [torch.zeros((), dtype=torch.int64), torch.zeros(1), torch.zeros((), dtype=torch.bfloat16)],
    ids=["int64", "vector", "bfloat16"],
)
def test_an_alpha_that_is_true_keeps_its_bytes(layout: str, like: torch.Tensor, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", alpha=3.0, alpha_like=like)
    there = written(lt.load(made.path), layout)
    (dtype,) = {made.tensors[key].dtype for key in made.tensors if key.endswith(".alpha")}
    assert dtype == like.dtype
    alphas = [ref for name, ref in there.items() if name.endswith(".alpha")]
    assert len(alphas) == len(make.SD15)
    assert {(ref.dtype, ref.shape) for ref in alphas} == {(make._NAMES[like.dtype], tuple(like.shape))}


def test_an_alpha_that_is_not_true_any_more_is_made_anew(tmp_path: Path) -> None:
    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "sd15", rank=4, alpha=2.0).path)
    louder = {target: module._replace(scale=1.5) for target, module in adapter.modules.items()}
    there = written(replace(adapter, modules=louder), "kohya")
    assert {ref.scalar() for name, ref in there.items() if name.endswith(".alpha")} == {6.0}


def test_ofts_constraint_stays_and_is_not_invented(tmp_path: Path) -> None:
    stated = lt.load(
        make.kohya(tmp_path / "a.safetensors", "sd15", kind="oft", alpha=0.001).path, arch="sd15"
    )
    values = [ref.scalar() for name, ref in written(stated, "comfy").items() if name.endswith(".alpha")]
    assert values == pytest.approx([0.001] * len(make.SD15), rel=1e-6)
    silent = lt.load(make.kohya(tmp_path / "b.safetensors", "sd15", kind="oft", alpha=None).path, arch="sd15")
    assert not [name for name in written(silent, "comfy") if name.endswith(".alpha")]


@pytest.mark.parametrize("layout", [*LYCORIS, "ai-toolkit"])
def test_a_whole_lokrs_alpha_stays_as_stated(layout: str, tmp_path: Path) -> None:
    made = make.kohya(tmp_path / "a.safetensors", "sd15", kind="lokr_full", alpha=1e10)
    there = written(lt.load(made.path), layout)
    assert {ref.scalar() for name, ref in there.items() if name.endswith(".alpha")} == {1e10}
    assert {module.scale for module in formats.read(there).modules.values()} == {1.0}


@pytest.mark.parametrize("kind", ["lokr_full", "oft"])
def test_a_scale_that_no_alpha_can_state_is_refused(kind: str, tmp_path: Path) -> None:
    adapter = lt.load(make.kohya(tmp_path / "a.safetensors", "sd15", kind=kind).path)
    louder = {target: module._replace(scale=2.0) for target, module in adapter.modules.items()}
    with pytest.raises(LayoutError, match="a scale of 2"):
        written(replace(adapter, modules=louder), "kohya")


def test_ai_toolkit_states_no_alpha(tmp_path: Path) -> None:
    plain = lt.load(make.kohya(tmp_path / "a.safetensors", "sd15", alpha=4.0, rank=4).path)
    there = written(plain, "ai-toolkit")
    assert {name.rpartition(".lora_")[2] for name in there} == {"A.weight", "B.weight"}
    scaled = lt.load(make.kohya(tmp_path / "b.safetensors", "sd15", alpha=2.0, rank=4).path)
    with pytest.raises(LayoutError, match=r"a scale of 0\.5"):
        written(scaled, "ai-toolkit")
    lokr = lt.load(make.kohya(tmp_path / "c.safetensors", "sd15", kind="lokr", alpha=2.0, rank=4).path)
    again = formats.read(written(lokr, "ai-toolkit"))
    assert {module.scale for module in again.modules.values()} == {0.5}


SHAPES = {
    ("out", 2): {"dora_scale": (12, 1), "lora_magnitude_vector": (12,)},
    ("out", 4): {"dora_scale": (12, 1, 1, 1), "lora_magnitude_vector": (1, 12, 1, 1)},
    ("in", 2): {"dora_scale": (1, 12)},
    ("in", 4): {"dora_scale": (1, 12, 1, 1)},
}


@pytest.mark.parametrize("source", ["kohya", "peft-like"])
@pytest.mark.parametrize(("axis", "axes"), SHAPES)
def test_a_magnitude_has_each_layouts_shape(axis: str, axes: int, source: str, tmp_path: Path) -> None:
    name = "attn1_to_out" if axes == 2 else "downsamplers_0_conv"
    made = make.kohya(tmp_path / "a.safetensors", "sd15", dora=axis, only=[name], alpha=None)
    adapter = lt.load(made.path, arch="sd15")
    if source == "peft-like" and axis == "out":
        (module,) = adapter.modules.values()
        shape = (12,) if axes == 2 else (1, 12, 1, 1)
        assert module.magnitude is not None
        module = module._replace(magnitude=module.magnitude.reshaped(shape))
        adapter = replace(adapter, modules={module.target: module})
    for layout in (*LYCORIS, "ai-toolkit", "diffusers", "peft"):
        suffix = "dora_scale" if layout in LYCORIS else "lora_magnitude_vector"
        expected = SHAPES[axis, axes].get(suffix)
        if expected is None:
            with pytest.raises(LayoutError, match="magnitude per input"):
                written(adapter, layout)
            continue
        there = written(adapter, layout)
        (found,) = [ref.shape for key, ref in there.items() if key.endswith(suffix)]
        assert found == expected
        assert {module.magnitude_axis for module in formats.read(there, arch="sd15").modules.values()} == {
            axis
        }


def test_a_bias_of_pefts_factors_has_a_place_where_peft_reads_it(tmp_path: Path) -> None:
    adapter = lt.load(make.peft(tmp_path / "a", lora_bias=True).path)
    assert [name for name in written(adapter, "peft") if name.endswith("lora_B.bias")]
    module = next(iter(adapter.modules.values()))
    lacking = {layout: formats.get(layout).lacking(module) for layout in (*LYCORIS, "ai-toolkit")}
    assert set(lacking.values()) == {("up_bias",)}
    assert formats.get("diffusers").lacking(module) == ()


def test_onetrainers_second_oft_is_named_where_its_files_lie() -> None:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.oft_R.weight"
    adapter = formats.read({key: from_torch(key, torch.ones(2, 3))}, arch="sd15")
    assert set(written(adapter, "onetrainer")) == {key}
    assert set(written(adapter, "kohya")) == {key}
    with pytest.raises(LayoutError, match="oft_R"):
        written(adapter, "comfy")
