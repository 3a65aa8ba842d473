"""Scales folded into factors: ΔW stays, and powers of two round nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NonFiniteError, UnsupportedKindError
from loratools.model import Module, Target
from loratools.ops import _scale
from loratools.tensors import from_torch


def module(scale: float, dtype: torch.dtype = torch.float32, *, bias: bool = False) -> Module:
    generator = torch.Generator().manual_seed(3)
    factors = {
        "up": from_torch("up", torch.randn(6, 2, generator=generator).to(dtype)),
        "down": from_torch("down", torch.randn(2, 5, generator=generator).to(dtype)),
    }
    if bias:
        factors["up_bias"] = from_torch("bias", torch.randn(6, generator=generator).to(dtype))
    return Module(Target("denoiser", "x"), "lora", factors, scale, 2 * scale, 2, (6, 5))


def product(found: Module) -> torch.Tensor:
    up, down = (found.factors[role].load().double() for role in ("up", "down"))
    return found.scale * (up @ down)


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e4, 1e4, allow_nan=False).filter(lambda scale: scale == 0 or abs(scale) > 1e-4))
def test_the_delta_stays(scale: float) -> None:
    found, rounded = _scale.folded(module(scale))
    assert (found.scale, found.alpha, found.alpha_tensor) == (1.0, None, None)
    assert rounded is not _scale.is_power_of_two(scale)
    before = product(module(scale))
    assert (product(found) - before).norm() <= 1e-6 * before.norm()


@pytest.mark.parametrize("scale", [0.5, 2.0, -4.0, 2.0**-9, 1024.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_round_nothing(scale: float, dtype: torch.dtype) -> None:
    found, rounded = _scale.folded(module(scale, dtype))
    assert not rounded
    assert torch.equal(product(found), product(module(scale, dtype)))


def test_the_power_is_shared_by_both_factors_and_the_rest_goes_into_up() -> None:
    found, _ = _scale.folded(module(-6.0))
    before = module(-6.0)
    ratio = found.factors["down"].load() / before.factors["down"].load()
    assert torch.equal(ratio, torch.full_like(ratio, 2.0))
    torch.testing.assert_close(found.factors["up"].load(), -3.0 * before.factors["up"].load())


def test_it_is_rounded_once_to_the_store_dtype() -> None:
    found, _ = _scale.folded(module(0.3), "F16")
    before = {role: module(0.3).factors[role].load().double() for role in ("up", "down")}
    assert torch.equal(found.factors["down"].load(), (before["down"] * 0.5).to(torch.float16))
    assert torch.equal(found.factors["up"].load(), (before["up"] * 0.6).to(torch.float16))


def test_a_bias_beside_the_factors_is_scaled_with_them() -> None:
    found, _ = _scale.folded(module(0.25, bias=True))
    expected = 0.25 * module(0.25, bias=True).factors["up_bias"].load()
    assert torch.equal(found.factors["up_bias"].load(), expected)


def test_what_does_not_fit_the_dtype_is_an_error_and_not_an_infinity() -> None:
    found, _ = _scale.folded(module(1e10, torch.float16))
    with pytest.raises(NonFiniteError, match="float32"):
        found.factors["up"].load()


def test_a_kind_without_factors_to_fold_into_is_refused() -> None:
    other = module(0.5)._replace(kind="vera")
    with pytest.raises(UnsupportedKindError, match="--as lora"):
        _scale.folded(other)
