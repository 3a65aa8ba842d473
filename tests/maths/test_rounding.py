"""Rounding: neighbours, expectations, and what is left of an error in a subspace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loratools.errors import NonFiniteError
from loratools.maths import rounding

DTYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
PATTERNS = {1: torch.uint8, 2: torch.int16}


def finite_values(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of a dtype, in order, zero once."""
    size = dtype.itemsize
    bits = torch.arange(-(1 << (8 * size - 1)), 1 << (8 * size - 1)).to(
        torch.int8 if size == 1 else torch.int16
    )
    values = bits.view(dtype).double()
    return torch.unique(values[values.isfinite()])


def between(dtype: torch.dtype, count: int = 2000, seed: int = 0) -> torch.Tensor:
    """float32 numbers over the dtype's whole range, subnormal ones among them."""
    values = finite_values(dtype)
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(len(values) - 1, (count,), generator=generator)
    share = torch.rand(count, dtype=torch.float64, generator=generator)
    return torch.lerp(values[place], values[place + 1], share).float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_is_the_nearest_of_all_values(dtype: torch.dtype) -> None:
    values, wanted = finite_values(dtype), between(dtype)
    found = rounding.nearest(wanted, dtype)
    assert found.dtype == dtype
    after = torch.searchsorted(values, wanted.double()).clamp(1, len(values) - 1)
    distance = torch.minimum((values[after] - wanted).abs(), (values[after - 1] - wanted).abs())
    assert torch.equal((found.double() - wanted).abs(), distance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_stochastic_takes_a_neighbour_and_keeps_what_is_exact(dtype: torch.dtype, wide: torch.dtype) -> None:
    values, wanted = finite_values(dtype), between(dtype).to(wide)
    found = rounding.stochastic(wanted, dtype, torch.Generator().manual_seed(1)).double()
    above = values[torch.searchsorted(values, wanted.double())]
    below = values[torch.searchsorted(values, wanted.double(), right=True) - 1]
    assert bool(((found == above) | (found == below)).all())
    assert bool((found == above).any() and (found == below).any())
    exact = rounding.stochastic(values.to(wide), dtype, torch.Generator().manual_seed(2))
    assert torch.equal(exact.double(), values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_is_unbiased(dtype: torch.dtype) -> None:
    tiny = float(finite_values(dtype).abs().unique()[1])
    for value in (0.3 * tiny, -0.3 * tiny, 1.013, -1.013, 0.1234, 300.7):
        draws = torch.full((40_000,), value)
        generator = torch.Generator().manual_seed(7)
        found = rounding.stochastic(draws, dtype, generator).double()
        low, high = float(found.min()), float(found.max())
        assert low < value < high
        share = (float(draws[0]) - low) / (high - low)
        sigma = (high - low) * math.sqrt(share * (1 - share) / len(draws))
        assert abs(float(found.mean()) - float(draws[0])) < 5 * sigma


def test_the_sign_of_zero_stays() -> None:
    zeros = torch.tensor([0.0, -0.0])
    for dtype in DTYPES:
        found = rounding.stochastic(zeros, dtype, torch.Generator().manual_seed(0)).float()
        assert torch.equal(torch.signbit(found), torch.tensor([False, True]))
        assert not found.any()


@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"),
    [
        (torch.float16, 65519.996, 65520.0),
        (torch.bfloat16, 3.396e38, 3.4e38),
        (torch.float8_e4m3fn, 464.0, 464.1),
        (torch.float8_e5m2, 61439.9, 61440.0),
    ],
)
def test_what_does_not_fit_is_refused_and_never_clamped(
    dtype: torch.dtype, largest: float, beyond: float
) -> None:
    fitting = torch.tensor([-largest, 1.0])
    assert rounding.fits(fitting, dtype)
    assert float(rounding.nearest(fitting, dtype)[0].float()) == -torch.finfo(dtype).max
    assert not rounding.fits(torch.tensor([1.0, -beyond]), dtype)
    with pytest.raises(NonFiniteError, match=r"largest value is .*holds values up to"):
        rounding.nearest(torch.tensor([1.0, -beyond]), dtype)
    # Above the largest value there is no second neighbour to choose from.
    with pytest.raises(NonFiniteError, match="largest value is"):
        rounding.stochastic(fitting, dtype, torch.Generator())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    values = torch.tensor([1.0, bad, 2.0])
    for dtype in [*DTYPES, torch.float32]:
        assert not rounding.fits(values, dtype)
        with pytest.raises(NonFiniteError, match="1 of 3 values are NaN or infinite"):
            rounding.nearest(values, dtype)
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            rounding.stochastic(values, dtype, torch.Generator())


def test_nothing_fits() -> None:
    empty = torch.empty(0, 3)
    assert rounding.fits(empty, torch.float16)
    assert rounding.nearest(empty, torch.float16).shape == (0, 3)
    assert rounding.stochastic(empty, torch.float16, torch.Generator()).shape == (0, 3)


def subspaces(out: int, width: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(side, rank, dtype=torch.float64, generator=generator) for side in (out, width))
    return torch.linalg.qr(left).Q.float(), torch.linalg.qr(right).Q.float()


def left_over(stored: torch.Tensor, target: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    """‖Uᵀ(Q − T)V‖ in float64."""
    error = stored.double() - target.double()
    return float((left.double().T @ error @ right.double()).norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_compensation_takes_the_error_out_of_the_subspace(dtype: torch.dtype) -> None:
    left, right = subspaces(320, 256, 8)
    target = torch.randn(320, 256, generator=torch.Generator().manual_seed(1))
    nearest = rounding.nearest(target, dtype)
    found = rounding.compensated(target, dtype, left, right)
    before, after = (left_over(each, target, left, right) for each in (nearest, found.data))
    assert found.before == pytest.approx(before, rel=1e-3)
    assert found.after == pytest.approx(after, rel=2e-2)
    assert after < before / 12
    # Nearly all of the rounding stays that to nearest.
    error, least = (float((each.double() - target.double()).norm()) for each in (found.data, nearest))
    assert error < 1.01 * least


def test_compensation_is_never_worse_than_rounding_to_nearest() -> None:
    for seed in range(20):
        left, right = subspaces(4, 3, 2, seed)
        target = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        found = rounding.compensated(target, torch.float8_e5m2, left, right)
        nearest = rounding.nearest(target, torch.float8_e5m2)
        assert left_over(found.data, target, left, right) <= left_over(nearest, target, left, right) + 1e-6
        assert found.after <= found.before


def test_what_is_exact_needs_no_compensation() -> None:
    left, right = subspaces(16, 12, 2)
    target = torch.randn(16, 12).bfloat16().float()
    found = rounding.compensated(target, torch.bfloat16, left, right)
    assert found.rounds == 0
    assert torch.equal(found.data.float(), target)


def test_compensation_under_scales() -> None:
    left, right = subspaces(200, 160, 4)
    target = torch.randn(200, 160, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(0.01, 0.02, 200)[:, None]
    found = rounding.compensated(target, torch.float8_e4m3fn, left, right, scale=scale)
    assert found.after < found.before / 10
    assert left_over(found.data.float() * scale, target, left, right) == pytest.approx(found.after, rel=1e-2)


def test_compensation_refuses_what_does_not_fit() -> None:
    left, right = subspaces(4, 3, 1)
    with pytest.raises(NonFiniteError, match="largest value is 70000"):
        rounding.compensated(torch.full((4, 3), 7e4), torch.float16, left, right)
    # At the edge of the range a correction may lead beyond it: what was reached until then is kept.
    edge = torch.full((4, 3), 65519.0)
    found = rounding.compensated(edge, torch.float16, left, right)
    assert bool(found.data.isfinite().all())
    assert np.isfinite(found.after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_fits_nowhere(dtype: torch.dtype, value: float) -> None:
    assert not rounding.fits(torch.tensor([1.0, value], dtype=torch.float64), dtype)
    assert rounding.fits(torch.tensor([1.0, torch.finfo(dtype).max], dtype=torch.float64), dtype)
