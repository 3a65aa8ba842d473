"""Factor-space arithmetic equals the dense truth in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NonFiniteError, OptionError, ShapeError
from loratools.maths import lowrank
from loratools.maths.lowrank import COMPUTE, Factors, compress, numerical_rank, stack, svd

few = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.integers(1, 24)


def random_factors(out, rank, inner, seed=0, dtype=COMPUTE):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, generator=generator, dtype=COMPUTE)
    down = torch.randn(rank, inner, generator=generator, dtype=COMPUTE)
    return Factors(up.to(dtype), down.to(dtype))


def relative(found, truth):
    return float((found - truth).norm() / truth.norm())


@few
@given(out=sizes, inner=sizes, rank=st.integers(1, 30), seed=st.integers(0, 99))
def test_svd_equals_dense_svd(out, inner, rank, seed):
    factors = random_factors(out, rank, inner, seed)
    found, truth = svd(factors), factors.delta()
    k = min(out, inner, rank)
    assert found.u.shape == (out, k)
    assert found.vh.shape == (k, inner)
    assert relative(found.u * found.sigma @ found.vh, truth) < 1e-12
    expected = torch.linalg.svdvals(truth)[:k]
    torch.testing.assert_close(found.sigma, expected, rtol=0, atol=1e-12 * float(expected[0]))
    identity = torch.eye(k, dtype=COMPUTE)
    torch.testing.assert_close(found.u.T @ found.u, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.vh @ found.vh.T, identity, rtol=0, atol=1e-12)


@few
@given(out=sizes, inner=sizes, rank=st.integers(1, 30), asked=st.integers(1, 30), seed=st.integers(0, 99))
def test_compression_is_the_best_of_its_rank(out, inner, rank, asked, seed):
    factors = random_factors(out, rank, inner, seed)
    found, truth = compress(factors, asked), factors.delta()
    sigma = torch.linalg.svdvals(truth)
    assert found.factors.rank == min(asked, rank, out, inner)
    best = float(sigma[asked:].square().sum().sqrt())
    error = float((found.factors.delta() - truth).norm())
    assert error == pytest.approx(best, rel=1e-9, abs=1e-11 * float(truth.norm()))
    assert found.energy == pytest.approx(
        float(sigma[:asked].square().sum() / sigma.square().sum()), abs=1e-12
    )


@few
@given(out=sizes, inner=sizes, rank=st.integers(1, 40), seed=st.integers(0, 99))
def test_without_a_rank_nothing_is_lost(out, inner, rank, seed):
    factors = random_factors(out, rank, inner, seed)
    found = compress(factors)
    assert found.energy == 1.0
    assert found.factors.rank <= min(out, inner, rank)
    assert relative(found.factors.delta(), factors.delta()) < 1e-10


@few
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
)
def test_stack_is_the_weighted_sum(ranks, weights):
    parts = [random_factors(13, rank, 17, index) for index, rank in enumerate(ranks)]
    weights = weights[: len(parts)]
    found = stack(parts, weights)
    truth = sum(weight * part.delta() for weight, part in zip(weights, parts, strict=True))
    assert found.rank == sum(ranks)
    size = sum(float(part.delta().norm()) for part in parts) * 3
    assert float((found.delta() - truth).norm()) < 1e-14 * size


@pytest.mark.parametrize("shape", [(8, 3, 6), (6, 4, 6), (1280, 8, 640), (5, 5, 900)])
def test_a_minus_a_is_zero_of_rank_one(shape):
    part = random_factors(*shape)
    found = compress(stack([part, part], [1.0, -1.0]))
    assert found.factors.rank == 1
    assert not found.factors.up.any()
    assert not found.factors.down.any()
    assert found.energy == 1.0


@pytest.mark.parametrize("shape", [(30, 4, 20), (1280, 8, 640)])
@pytest.mark.parametrize("rank", [None, 16])
def test_a_plus_a_has_the_rank_of_a(shape, rank):
    part = random_factors(*shape)
    found = compress(stack([part, part], [1.0, 1.0]), rank)
    assert found.factors.rank == shape[1]
    assert relative(found.factors.delta(), 2 * part.delta()) < 1e-12


def test_rank_follows_the_matrix_not_the_balance_of_its_factors():
    part = random_factors(40, 6, 30)
    scale = 10.0 ** torch.arange(-6, 6, 2, dtype=COMPUTE)
    lopsided = Factors(part.up * scale, part.down / scale[:, None])
    found = compress(lopsided)
    assert found.factors.rank == 6
    assert relative(found.factors.delta(), part.delta()) < 1e-10


def test_both_sides_carry_the_root_of_sigma():
    found = compress(random_factors(30, 5, 20), 3)
    sigma = found.sigma[:3]
    torch.testing.assert_close(found.factors.up.norm(dim=0).square(), sigma)
    torch.testing.assert_close(found.factors.down.norm(dim=1).square(), sigma)


def test_the_same_matrix_gives_the_same_factors():
    part = random_factors(30, 5, 20)
    once, again = compress(part, 4).factors, compress(part, 4).factors
    assert torch.equal(once.up, again.up)
    assert torch.equal(once.down, again.down)
    # Flipping the signs of the terms leaves the matrix, and must leave the factors, as they are.
    flipped = compress(Factors(-part.up, -part.down), 4).factors
    torch.testing.assert_close(flipped.up, once.up, rtol=1e-9, atol=1e-11)


def test_half_precision_factors_are_computed_in_float64():
    part = random_factors(64, 6, 48, dtype=torch.float16)
    found = compress(part)
    assert found.factors.up.dtype == torch.float64
    assert relative(found.factors.delta(), part.up.double() @ part.down.double()) < 1e-12


def test_zero_factors():
    found = compress(Factors(torch.zeros(7, 3), torch.randn(3, 5)), 2)
    assert (found.factors.rank, found.energy) == (1, 1.0)
    assert not found.factors.delta().any()


def test_numerical_rank_of_known_values():
    sigma = torch.tensor([1.0, 1e-3, 1e-15, 0.0], dtype=COMPUTE)
    assert numerical_rank(sigma, (10, 10), torch.float64) == 2
    assert numerical_rank(sigma, (1, 1), torch.float64) == 3
    assert numerical_rank(sigma, (10, 20000), torch.float32) == 1
    assert numerical_rank(sigma, (1, 1), torch.float64, floor=0.01) == 1
    assert numerical_rank(torch.zeros(3), (3, 3), torch.float32) == 0


def test_the_second_algorithm_takes_over_where_the_first_fails(monkeypatch):
    part = random_factors(20, 4, 15)

    def fails(*args, **options):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(lowrank.torch.linalg, "svd", fails)
    found = svd(part)
    assert relative(found.u * found.sigma @ found.vh, part.delta()) < 1e-12


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_factors_are_refused(value):
    part = random_factors(6, 2, 5)
    part.up[1, 1] = value
    with pytest.raises(NonFiniteError):
        compress(part)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="do not fit"):
        Factors(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ShapeError, match="do not fit"):
        Factors(torch.ones(3, 2), torch.ones(2, 3).double())
    with pytest.raises(ShapeError, match="cannot be added"):
        stack([random_factors(3, 1, 3), random_factors(3, 1, 4)], [1.0, 1.0])
    with pytest.raises(OptionError, match="rank 0"):
        compress(random_factors(3, 1, 3), 0)


@pytest.mark.parametrize("closeness", [1.0, 1e-1, 1e-3, 1e-6, 1e-12, 0.0])
def test_nearly_dependent_columns_are_as_exact_as_any(closeness: float) -> None:
    """Gram matrices square the condition number: what they cannot resolve must take the careful way."""
    generator = torch.Generator().manual_seed(3)
    up = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    up[:, 3:] = up[:, :3] + closeness * torch.randn(200, 3, generator=generator, dtype=torch.float64)
    down = torch.randn(6, 150, generator=generator, dtype=torch.float64)
    factors = Factors(up, down)
    dense = up @ down
    u, sigma, vh = torch.linalg.svd(dense, full_matrices=False)
    for rank in (2, 4, 6):
        best = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
        found = compress(factors, rank)
        assert float((found.factors.delta() - best).norm() / dense.norm()) < 1e-12
    whole = compress(factors)
    assert float((whole.factors.delta() - dense).norm() / dense.norm()) < 1e-12
    assert whole.factors.rank == (3 if closeness == 0.0 else 6)


@pytest.mark.parametrize("rank", [None, 1])
def test_what_cancels_is_of_no_size(rank):
    """Its singular values are rounding, and none of them is in the factors."""
    one = random_factors(14, 3, 11)
    found = compress(stack([one, one], [1.0, -1.0]), rank)
    assert not found.factors.delta().any()
    assert (found.factors.rank, found.energy, found.square) == (1, 1.0, 0.0)
