"""float8 scales by all their names, and the packed weights that are refused by the name of their scheme."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.errors import UnsupportedKindError
from loratools.io.base import Base, Weight
from loratools.ops._changes import Change
from loratools.ops._quantised import block_of, refuse, scale_of, scheme_of

FLOAT8 = ("X.weight", "F8_E4M3", (256, 384))


def part(*tensors: tuple[str, str, tuple[int, ...]]) -> dict[str, Weight]:
    return {key: Weight(key, shape, dtype, "base.safetensors") for key, dtype, shape in tensors}


def refused(weights: dict[str, Weight], key: str, config: dict[str, Any] | None = None) -> str:
    base = Base("base.safetensors", {"": weights}, configs={"": config or {}})
    with pytest.raises(UnsupportedKindError) as caught:
        refuse(base, [Change("", weights[key], (), "X", "language_model")])
    assert key in caught.value.keys
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "block"),
    [
        ("X.scale_weight", (), (256, 384)),
        ("X.scale_weight", (1,), (256, 384)),
        ("X.weight_scale", (), (256, 384)),
        ("X.weight_scale", (256, 1), (1, 384)),
        ("X.weight_scale", (256,), (1, 384)),
        ("X.weight_scale_inv", (2, 3), (128, 128)),
        ("X.weight_scale", (256, 12), (1, 32)),
        ("X.weight_scale", (1, 1), (256, 384)),
    ],
)
def test_a_scale_is_found_by_any_of_its_names(
    name: str, shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    weights = part(FLOAT8, (name, "F32", shape), ("X.input_scale", "F32", ()))
    scale = scale_of(weights, weights["X.weight"])
    assert scale is not None
    assert scale.key == name
    assert block_of(weights["X.weight"], scale) == block
    refuse(Base("base", {"": weights}), [Change("", weights["X.weight"], (), "X", "denoiser")])


def test_a_parameter_without_a_module_has_its_scale_behind_its_name() -> None:
    weights = part(("e.gate_up_proj", "F8_E4M3", (4, 8, 8)), ("e.gate_up_proj_scale_inv", "F32", (4, 1, 1)))
    scale = scale_of(weights, weights["e.gate_up_proj"])
    assert scale is not None
    assert scale.key == "e.gate_up_proj_scale_inv"
    assert "scales of shape [4, 1, 1] for [4, 8, 8]" in refused(weights, "e.gate_up_proj")


def test_float8_without_a_scale_is_a_plain_cast_and_others_have_none() -> None:
    alone = part(FLOAT8, ("Y.weight_scale", "F32", ()))
    assert scale_of(alone, alone["X.weight"]) is None
    wide = part(("X.weight", "BF16", (4, 4)), ("X.weight_scale", "F32", ()))
    assert scale_of(wide, wide["X.weight"]) is None
    for weights in (alone, wide):
        assert scheme_of(weights, "X") is None
        refuse(Base("base", {"": weights}), [Change("", weights["X.weight"], (), "X", "denoiser")])


@given(rows=st.integers(1, 700), columns=st.integers(1, 700))
def test_blocks_of_128_are_found_from_their_count(rows: int, columns: int) -> None:
    weight = Weight("X.weight", (rows, columns), "F8_E4M3", "f")
    scale = Weight("X.weight_scale_inv", (-(-rows // 128), -(-columns // 128)), "F32", "f")
    block = block_of(weight, scale)
    assert block is not None
    for length, size, count in zip((rows, columns), block, scale.shape, strict=True):
        assert -(-length // size) == count
        assert size == 128 or count == 1


@pytest.mark.parametrize("shape", [(3,), (257, 1), (2, 3, 1), (300, 400)])
def test_scales_of_no_known_grid_are_refused(shape: tuple[int, ...]) -> None:
    weights = part(FLOAT8, ("X.weight_scale", "F32", shape))
    assert f"float8 with scales of shape {list(shape)}" in refused(weights, "X.weight")


@pytest.mark.parametrize(
    ("scheme", "tensors"),
    [
        ("bitsandbytes NF4", ["X.weight", "X.weight.absmax", "X.weight.quant_state.bitsandbytes__nf4"]),
        ("bitsandbytes FP4", ["X.weight", "X.weight.absmax", "X.weight.quant_state.bitsandbytes__fp4"]),
        ("bitsandbytes 4-bit", ["X.weight", "X.weight.absmax", "X.weight.quant_map"]),
        ("bitsandbytes int8", ["X.weight", "X.SCB"]),
        ("quanto", ["X.weight", "X.weight._data"]),
        ("NVFP4", ["X.weight", "X.weight_scale", "X.weight_scale_2"]),
        ("ComfyUI's quantisation", ["X.weight", "X.comfy_quant"]),
        ("U8 numbers", ["X.weight"]),
    ],
)
def test_packed_weights_are_refused_by_the_name_of_their_scheme(scheme: str, tensors: list[str]) -> None:
    weights = part(*((name, "U8", (8, 1)) for name in tensors))
    assert scheme_of(weights, "X") == scheme
    message = refused(weights, "X.weight")
    assert scheme in message
    assert "quantise the result again" in message


@pytest.mark.parametrize(
    ("scheme", "method", "tensors"),
    [
        ("GPTQ", "", ["X.qweight", "X.qzeros", "X.scales", "X.g_idx"]),
        ("GPTQ or AWQ", "", ["X.qweight", "X.qzeros", "X.scales"]),
        ("AWQ", "awq", ["X.qweight", "X.qzeros", "X.scales"]),
        ("MXFP4", "", ["X_blocks", "X_scales"]),
        ("compressed-tensors", "", ["X.weight_packed", "X.weight_shape"]),
        ("HQQ", "", ["X.W_q"]),
    ],
)
def test_a_module_without_a_weight_is_known_by_what_it_has(
    scheme: str, method: str, tensors: list[str]
) -> None:
    weights = part(*((name, "I32", (8, 1)) for name in tensors))
    config = {"quantization_config": {"quant_method": method}}
    assert scheme_of(weights, "X", config) == scheme
    assert scheme_of(weights, "Y", config) is None


def test_the_configuration_names_what_its_tensors_do_not() -> None:
    weights = part(("X.weight", "I8", (8, 8)))
    config = {"quantization_config": {"quant_method": "torchao"}}
    assert scheme_of(weights, "X", config) == "torchao"
    assert "torchao" in refused(weights, "X.weight", config)
