"""Singular values without vectors are those of the whole decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NonFiniteError
from loratools.maths import spectrum
from loratools.maths.lowrank import COMPUTE, Factors, compress, svd
from loratools.maths.spectrum import singular_values

sizes = st.integers(1, 24)


def random_factors(out, rank, inner, seed=0):
    generator = torch.Generator().manual_seed(seed)
    up, down = (
        torch.randn(*shape, generator=generator, dtype=COMPUTE) for shape in ((out, rank), (rank, inner))
    )
    return Factors(up, down)


def assert_same(factors):
    found, whole = singular_values(factors), svd(factors)
    torch.testing.assert_close(found.sigma, whole.sigma, rtol=0, atol=1e-12 * float(whole.sigma[0]))
    kept = compress(factors).factors.rank
    assert max(found.real, 1) == kept


@settings(max_examples=40, deadline=None, derandomize=True)
@given(out=sizes, inner=sizes, rank=st.integers(1, 30), seed=st.integers(0, 99))
def test_all_shapes(out, inner, rank, seed):
    assert_same(random_factors(out, rank, inner, seed))


@pytest.mark.parametrize("grade", [1.0, 1e-4, 1e-9])
def test_columns_of_very_different_lengths(grade):
    factors = random_factors(60, 4, 50)
    lengths = torch.tensor([1.0, grade, grade**0.5, 1.0], dtype=COMPUTE)
    assert_same(Factors(factors.up * lengths, factors.down))


@pytest.mark.parametrize("apart", [0.0, 1e-14, 1e-9, 1e-5, 1e-3])
def test_columns_that_are_close_to_dependent(apart):
    """Gram matrices square the condition number; these are left to Householder reflections."""
    factors = random_factors(60, 6, 50)
    up = factors.up.clone()
    up[:, 3] = up[:, 0] + apart * up[:, 3]
    assert_same(Factors(up, factors.down))


def test_terms_that_cancel_leave_nothing():
    factors = random_factors(30, 3, 20)
    pair = Factors(torch.cat([factors.up, -factors.up], dim=1), torch.cat([factors.down, factors.down]))
    assert singular_values(pair).real == 0


def test_a_zero_matrix_has_none():
    found = singular_values(Factors(torch.zeros(9, 3), torch.ones(3, 8)))
    assert (found.real, found.sigma.dtype, float(found.sigma.max())) == (0, COMPUTE, 0.0)


def test_float16_is_widened():
    factors = random_factors(40, 5, 30).to(torch.float16)
    assert_same(factors)


def test_what_lapack_gives_up_on_is_decomposed_otherwise(monkeypatch):
    factors = random_factors(20, 4, 10)
    wanted = singular_values(factors)

    def refuse(_):
        raise RuntimeError("the algorithm failed to converge")

    monkeypatch.setattr(spectrum.torch.linalg, "svdvals", refuse)
    torch.testing.assert_close(singular_values(factors).sigma, wanted.sigma, rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["up", "down"])
def test_not_a_number_is_refused(side, value):
    factors = random_factors(12, 3, 10)
    getattr(factors, side)[1, 1] = value
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        singular_values(factors)
