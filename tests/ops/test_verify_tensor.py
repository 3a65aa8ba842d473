"""The verdict on one tensor: every fair rounding passes, and nothing else does."""

from __future__ import annotations

import math

import pytest
import torch

from loratools.maths import rounding
from loratools.ops import _verify_tensor
from loratools.ops._verify_tasks import BAKED, LOST, NOT_BAKED, PARTLY, WRONG
from loratools.ops._verify_tensor import Stored, grid, measure
from loratools.ops.checkpoint_results import VerifiedTensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
HALVES = [torch.float16, torch.bfloat16]


def problem(dtype, size=1.0, shape=(96, 80), seed=0):
    """W on the grid of a dtype, and a ΔW of rank 4 whose values are ``size`` steps of W's, in float64."""
    draw = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=draw) * 0.05).to(dtype)
    left, right = (torch.randn(side, 4, generator=draw, dtype=torch.float64) for side in shape)
    step = 0.05 * torch.finfo(dtype).eps
    return base, base.double() + size * step * (left @ right.T) / 2


def judged(base, target, stored):
    empty = VerifiedTensor("key", "target", "denoiser", WRONG, 0.0, None, None, None, "F16")
    return _verify_tensor._judged(empty, measure(Stored(base), target, Stored(stored)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_grid_is_the_dtype_s(dtype):
    patterns = torch.arange(256, dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else None
    if patterns is None:
        patterns = (torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 1e-3).to(dtype)
        patterns = torch.cat(
            [patterns, torch.tensor([0.0, torch.finfo(dtype).smallest_normal / 4]).to(dtype)]
        )
    values = patterns[patterns.float().isfinite()].double().unique()
    near, step = grid(values, dtype)
    assert torch.equal(near, values)
    off = values + step * 0.3
    assert torch.equal(grid(off, dtype)[0][:-1], off.float().to(dtype).double()[:-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_step_at_zero_is_the_smallest_number(dtype):
    info = torch.finfo(dtype)
    near, step = grid(torch.tensor([0.0, -0.0], dtype=torch.float64), dtype)
    assert not near.any()
    assert step.tolist() == [info.smallest_normal * info.eps] * 2


def test_a_value_far_off_is_seen_beside_zeros():
    base = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
    base[0] = 0.0
    base = base.half()
    target = base.double()
    target[1:] += 2e-5
    stored = target.half()
    stored[5, 5] += 2e-3
    assert judged(base, target, stored).verdict == "wrong"


@pytest.mark.parametrize("size", [0.01, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_to_nearest_is_baked(dtype, size):
    base, target = problem(dtype, size)
    for exact in (target, target.float()):
        found = judged(base, target, grid(exact.double(), dtype)[0].to(dtype))
        assert found.verdict == BAKED, found
        assert found.error == pytest.approx(found.rounding, rel=1e-3)


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_stochastic_rounding_is_baked(dtype, size):
    for seed in range(20):
        base, target = problem(dtype, size, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        found = judged(base, target, rounding.stochastic(target, dtype, draw))
        assert found.verdict == BAKED, found


@pytest.mark.parametrize("shape", [(3,), (1,), (5, 1)])
@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_of_a_few_values_is_baked(dtype, shape):
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        base = torch.randn(shape, generator=draw).to(dtype)
        target = base.double() + 0.003 * torch.randn(shape, generator=draw, dtype=torch.float64)
        found = judged(base, target, rounding.stochastic(target, dtype, draw))
        assert found.verdict == BAKED, found


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_compensated_rounding_is_baked(dtype, size):
    base, target = problem(dtype, size)
    left, _, right = torch.linalg.svd(target - base.double())
    stored = rounding.compensated(target, dtype, left[:, :4], right[:4].T).data
    found = judged(base, target, stored)
    assert found.verdict == BAKED, found
    assert found.kept == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_change_that_was_computed_in_half_precision_is_baked(dtype):
    base, target = problem(dtype, 5.0)
    change = (target - base.double()).to(torch.bfloat16)
    found = judged(base, target, base + change.to(dtype))
    assert found.verdict == BAKED, found


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_itself_is_not_baked(dtype, size):
    base, target = problem(dtype, size)
    found = judged(base, target, base)
    assert found.verdict == NOT_BAKED
    assert found.kept == 0.0
    assert found.error == pytest.approx(1.0)


def test_a_change_without_room_cannot_be_told_from_none():
    base, _ = problem(torch.bfloat16)
    base = torch.where(base < 0, -0.0625, 0.0625).to(torch.bfloat16)
    target = base.double() * (1 + 1e-5)
    found = judged(base, target, base)
    assert (found.verdict, found.note) == (BAKED, LOST)
    assert found.kept == 0.0
    assert found.rounding == pytest.approx(1.0)


@pytest.mark.parametrize("strength", [0.5, 0.9, 2.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_strength_is_partly_and_told(dtype, strength):
    base, target = problem(dtype, 300.0 if dtype == torch.float32 else 30.0)
    stored = base.double() + strength * (target - base.double())
    found = judged(base, target, grid(stored, dtype)[0].to(dtype))
    assert found.verdict == PARTLY
    assert found.strength == pytest.approx(strength, abs=0.02)


@pytest.mark.parametrize("dtype", HALVES)
def test_one_of_two_changes_is_partly(dtype):
    base, target = problem(dtype, 30.0)
    rows = target.clone()
    rows[40:] = base[40:].double()
    found = judged(base, target, rows.to(dtype))
    assert found.verdict == PARTLY
    assert found.strength is None
    assert 0.1 < found.kept < 0.9


@pytest.mark.parametrize("dtype", DTYPES)
def test_something_else_is_wrong(dtype):
    base, target = problem(dtype, 30.0)
    other = problem(dtype, 30.0, seed=1)[1] - problem(dtype, 30.0, seed=1)[0].double()
    assert judged(base, target, (base.double() + other).float().to(dtype)).verdict == WRONG


@pytest.mark.parametrize("dtype", HALVES)
def test_one_damaged_value_is_wrong(dtype):
    base, target = problem(dtype, 30.0, shape=(512, 512))
    stored = target.to(dtype)
    stored[7, 9] += 0.5
    found = judged(base, target, stored)
    assert (found.verdict, found.note) == (WRONG, _verify_tensor.FAR_OFF)


def test_what_should_not_change_and_does_is_wrong():
    base, _ = problem(torch.float16)
    assert judged(base, base.double(), base).verdict == BAKED
    assert judged(base, base.double(), base + 1).verdict == WRONG


def test_a_result_in_another_dtype_is_rounded_to_that():
    base, target = problem(torch.float32, 3e5)
    found = judged(base, target, target.to(torch.bfloat16))
    assert found.verdict == BAKED
    assert 0.01 < found.rounding < 1
    assert judged(base, target, base.to(torch.bfloat16)).verdict == NOT_BAKED


def test_scales_multiply_what_is_stored():
    base, target = problem(torch.float32, 1e6)
    scale = torch.full_like(base, 0.001)
    stored = (target / 0.001).float().to(torch.float8_e4m3fn)
    sums = measure(Stored(base), target, Stored(stored, scale))
    assert math.sqrt(sums.error) == pytest.approx(
        float((stored.double() * scale.double() - target).norm()), rel=1e-9
    )
    assert sums.beside <= 1e-6 * sums.nearest


def test_sums_do_not_depend_on_blocks(monkeypatch):
    base, target = problem(torch.float16, 2.0)
    whole = measure(Stored(base), target, Stored(target.half()))
    monkeypatch.setattr(_verify_tensor, "BLOCK", 1000)
    assert measure(Stored(base), target, Stored(target.half())) == pytest.approx(whole, rel=1e-12)
