"""The sum of squares is that of float64, of any layout, and shows what is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from loratools.maths.squares import square_of


@pytest.mark.parametrize("shape", [(0,), (1,), (300, 500), (7, 65536)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_sum_in_float64(shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert square_of(values) == pytest.approx(float(values.double().square().sum()), rel=1e-13)
    assert square_of(values.mT if values.ndim > 1 else values) == pytest.approx(square_of(values), rel=1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value):
    values = torch.zeros(70000)
    values[66000] = value
    assert not math.isfinite(square_of(values))


def test_neither_large_nor_small_numbers_are_lost():
    assert square_of(torch.tensor([3e38])) == pytest.approx(9e76, rel=1e-6)
    assert square_of(torch.tensor([1e-40])) == pytest.approx(1e-80, rel=1e-4)
