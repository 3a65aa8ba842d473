"""Factors of Kronecker and Hadamard products against the products themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NonFiniteError, OptionError
from loratools.maths import kron
from loratools.maths.lowrank import COMPUTE, Factors, dense_svd

SIZES = st.integers(1, 6)


def factors(out: int, width: int, rank: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(out, rank, dtype=COMPUTE, generator=generator),
        torch.randn(rank, width, dtype=COMPUTE, generator=generator),
    )


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, SIZES, SIZES, SIZES, SIZES)
def test_a_kronecker_product_has_the_kronecker_products_of_the_factors(a, b, c, d, one, two) -> None:
    left, right = factors(a, b, one, 1), factors(c, d, two, 2)
    found = kron.kronecker(left, right)
    assert found.rank == one * two
    assert relative(found.delta(), torch.kron(left.delta(), right.delta())) < 1e-13


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, SIZES, SIZES)
def test_an_elementwise_product_has_khatri_rao_products_as_factors(out, width, one, two) -> None:
    left, right = factors(out, width, one, 1), factors(out, width, two, 2)
    found = kron.khatri_rao(left, right)
    assert found.rank == one * two
    # Terms may cancel: the error is measured against what was added up.
    size = float((left.up.abs() @ left.down.abs() * (right.up.abs() @ right.down.abs())).norm())
    assert float((found.delta() - left.delta() * right.delta()).norm()) < 1e-14 * size


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, SIZES)
def test_thin_factors_are_the_matrix_at_its_rank(out, width, rank) -> None:
    matrix = factors(out, width, rank).delta()
    found = kron.thin(matrix)
    assert found.rank == min(out, width, rank)
    assert relative(found.delta(), matrix) < 1e-13


def test_a_matrix_of_full_rank_is_kept_to_the_bit() -> None:
    for shape in ((3, 5), (5, 3)):
        matrix = torch.randn(shape, dtype=COMPUTE, generator=torch.Generator().manual_seed(0))
        assert torch.equal(kron.thin(matrix).delta(), matrix)


def test_thin_factors_of_zero_are_zero() -> None:
    found = kron.thin(torch.zeros(4, 3, dtype=COMPUTE))
    assert found.rank == 1
    assert not found.delta().any()


def test_thin_factors_refuse_what_is_not_finite() -> None:
    with pytest.raises(NonFiniteError):
        kron.thin(torch.full((2, 2), float("nan"), dtype=COMPUTE))


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, SIZES, SIZES, st.integers(1, 40))
def test_leading_terms_are_the_best_approximation(a, b, c, d, rank) -> None:
    one, two = factors(a, b, 6, 1).delta(), factors(c, d, 6, 2).delta()
    whole = torch.kron(one, two)
    found = kron.leading(dense_svd(one), dense_svd(two), rank)
    sigma = torch.linalg.svdvals(whole)
    best = float(sigma[rank:].norm() / sigma.norm())
    assert found.factors.rank == min(rank, min(a, b) * min(c, d))
    assert abs(relative(found.factors.delta(), whole) - best) < 1e-12
    assert abs(1 - best**2 - found.energy) < 1e-12
    assert float((found.factors.up.norm(dim=0) - found.factors.down.norm(dim=1)).abs().max()) < 1e-12


def test_leading_terms_of_a_lower_rank_are_not_padded() -> None:
    one, two = factors(6, 6, 1).delta(), factors(4, 5, 2, 1).delta()
    found = kron.leading(dense_svd(one), dense_svd(two), 9)
    assert found.factors.rank == 2
    assert found.energy == 1.0
    assert relative(found.factors.delta(), torch.kron(one, two)) < 1e-12


def test_a_rank_below_one_is_refused() -> None:
    one = dense_svd(torch.eye(2, dtype=COMPUTE))
    with pytest.raises(OptionError):
        kron.leading(one, one, 0)


@given(st.integers(-40, 40), st.integers(-40, 40))
def test_evened_factors_are_of_one_size_and_the_same_matrix_to_the_bit(left, right) -> None:
    made = factors(4, 3, 2)
    uneven = Factors(made.up * 10.0**left, made.down * 10.0**right)
    found = kron.evened(uneven)
    assert torch.equal(found.delta(), uneven.delta())
    ratio = float(found.up.abs().max() / found.down.abs().max())
    assert 0.5 <= ratio <= 2.0


def test_factors_of_zero_cannot_be_evened() -> None:
    zero = Factors(torch.zeros(2, 1, dtype=COMPUTE), torch.ones(1, 2, dtype=COMPUTE))
    assert kron.evened(zero) is zero


@given(SIZES, SIZES, SIZES)
def test_the_norm_of_a_product_is_known_from_its_factors(out, width, rank) -> None:
    made = factors(out, width, rank)
    assert abs(kron.frobenius(made) / float(made.delta().norm()) - 1) < 1e-7
