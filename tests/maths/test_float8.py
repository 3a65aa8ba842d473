"""Float8 weights with scales, against the scales spread out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratools.errors import NonFiniteError, ShapeError
from loratools.maths import float8, rounding

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def spread_by_hand(scale: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    rows = np.minimum(np.arange(shape[0]) // block[0], scale.shape[0] - 1)
    columns = np.minimum(np.arange(shape[1]) // block[1], scale.shape[1] - 1)
    return scale[rows][:, columns]


# Shapes of a weight, of its scales, and the height and length of the blocks that one scale stands for.
FORMS = [
    ((6, 10), (), (6, 10)),
    ((6, 10), (1,), (6, 10)),
    ((6, 10), (1, 1), (6, 10)),
    ((6, 10), (6, 1), (1, 10)),
    ((6, 10), (6,), (1, 10)),
    ((6, 10), (1, 10), (6, 1)),
    ((256, 384), (2, 3), (128, 128)),
    ((200, 300), (2, 3), (128, 128)),
    ((100, 300), (1, 3), (128, 128)),
    ((200, 300), (4, 5), (64, 64)),
    ((8, 256), (8, 2), (1, 128)),
    ((90, 60), (3, 2), (32, 32)),
]


def example(
    shape: tuple[int, int], form: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(shape, generator=generator).mul_(20).to(dtype)
    return stored, torch.rand(form, generator=generator) * 0.01 + 0.001


def as_matrix(scale: torch.Tensor) -> torch.Tensor:
    return scale.reshape(-1, 1) if scale.dim() < 2 else scale


@pytest.mark.parametrize(("shape", "form", "block"), FORMS)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_form_of_scales_multiplies_its_block(shape, form, block, dtype) -> None:
    stored, scale = example(shape, form, dtype)
    by_hand = spread_by_hand(as_matrix(scale), shape, block)
    found = float8.dequantise(stored, scale)
    assert found.dtype == torch.float32
    assert torch.equal(found, stored.float() * by_hand)
    assert torch.equal(float8.spread(scale, stored.shape).expand(shape), by_hand)


@pytest.mark.parametrize(("shape", "form", "block"), FORMS)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_fits_keeps_its_scales_and_its_bits(shape, form, block, dtype) -> None:
    stored, scale = example(shape, form, dtype)
    found = float8.quantise(float8.dequantise(stored, scale, torch.float64), scale, dtype)
    assert found.scale is scale
    assert (found.grown, found.most) == (0, 1.0)
    assert torch.equal(found.data.float(), stored.float())


@pytest.mark.parametrize(("shape", "form", "block"), FORMS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_grows_just_enough_and_alone(shape, form, block, scale_dtype) -> None:
    stored, scale = example(shape, form, E4M3)
    scale = scale.to(scale_dtype)
    values = float8.dequantise(stored, scale)
    values[-1, -1] = -1000.0 * float(scale.flatten()[-1])
    found = float8.quantise(values, scale, E4M3)
    assert found.grown == 1
    assert found.scale.shape == scale.shape
    assert found.scale.dtype == scale_dtype
    changed = (found.scale != scale).flatten()
    assert changed.tolist() == [False] * (scale.numel() - 1) + [True]
    last = float(found.scale.flatten()[-1])
    # No smaller than needed, and no larger than the next number of its dtype.
    assert last * 448.0 >= float(-values[-1, -1])
    step = 1 + 2 * torch.finfo(scale_dtype).eps
    assert last <= float(-values[-1, -1]) / 448.0 * step
    assert found.most == pytest.approx(1000 / 448, rel=0.01)
    # Nothing was clamped: every value is within half a step of what it was.
    after = float8.dequantise(found.data, found.scale)
    spacing = float8.spread(found.scale.float(), values.shape).expand(shape) * 16
    assert bool(((after - values).abs() <= spacing).all())
    assert float(after[-1, -1]) == pytest.approx(float(values[-1, -1]), rel=0.01)


def test_a_convolutions_scales_are_per_output() -> None:
    stored, scale = torch.randn(4, 3, 2, 2).to(E4M3), torch.rand(4) + 0.5
    wanted = stored.float() * scale.reshape(4, 1, 1, 1)
    for form in ((4,), (4, 1), (4, 1, 1, 1)):
        assert torch.equal(float8.dequantise(stored, scale.reshape(form)), wanted)
        assert torch.equal(float8.quantise(wanted, scale.reshape(form), E4M3).data.float(), stored.float())


def test_powers_of_two_grow_to_the_next_power() -> None:
    scale = torch.tensor([[0.5], [0.25]]).to(torch.float8_e8m0fnu)
    values = torch.tensor([[300.0, 1.0], [100.0, 1.0]])
    found = float8.quantise(values, scale, E4M3)
    assert found.scale.float().flatten().tolist() == [1.0, 0.25]
    assert float8.dequantise(found.data, found.scale)[0].tolist() == [288.0, 1.0]
    assert found.grown == 1


def test_a_scale_of_zero_stays_with_zeros_and_grows_from_nothing_else() -> None:
    scale = torch.zeros(2, 1)
    values = torch.tensor([[0.0, 0.0], [448.0, -1.0]])
    found = float8.quantise(values, scale, E4M3)
    assert found.scale.flatten().tolist() == [0.0, 1.0]
    assert found.grown == 1
    assert found.most == float("inf")
    assert float8.dequantise(found.data, found.scale).tolist() == values.tolist()


def test_the_rounding_may_be_chosen() -> None:
    values, scale = torch.full((2000, 2), 0.0103), torch.tensor(0.01)
    generator = torch.Generator().manual_seed(0)
    found = float8.quantise(
        values, scale, E4M3, lambda divided, dtype, _: rounding.stochastic(divided, dtype, generator)
    )
    assert set(found.data.float().unique().tolist()) == {1.0, 1.125}
    mean = float(float8.dequantise(found.data, found.scale).mean())
    # 0.00125 apart, 4000 draws.
    assert abs(mean - 0.0103) < 5 * 0.00125 * 0.5 / 4000**0.5


@pytest.mark.parametrize("form", [(7,), (3, 3, 3), (5, 7), (6, 3, 1)])
def test_scales_that_fit_no_blocks_are_refused(form: tuple[int, ...]) -> None:
    stored = torch.zeros(6, 4).to(E4M3)
    with pytest.raises(ShapeError, match=r"float8 scales of shape .* for a weight of shape \[6, 4\]"):
        float8.dequantise(stored, torch.ones(form))
    with pytest.raises(ShapeError, match="one per row"):
        float8.quantise(torch.zeros(6, 4), torch.ones(form), E4M3)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="scale is NaN"):
        float8.dequantise(torch.zeros(2, 2).to(E4M3), torch.tensor(float("inf")))
    with pytest.raises(NonFiniteError, match="matrix holds NaN"):
        float8.quantise(torch.tensor([[1.0, float("nan")]]), torch.tensor(1.0), E4M3)
