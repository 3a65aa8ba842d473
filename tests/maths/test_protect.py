"""Null-space projection on factors equals it on dense matrices, and removes what it should."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NonFiniteError, OptionError, ShapeError
from loratools.maths.lowrank import COMPUTE, Factors
from loratools.maths.protect import leading, protected

few = settings(max_examples=25, deadline=None, derandomize=True)


def factors(rank=3, seed=0, shape=(14, 11), dtype=COMPUTE):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator, dtype=COMPUTE)
    down = torch.randn(rank, shape[1], generator=generator, dtype=COMPUTE)
    return Factors(up.to(dtype), down.to(dtype))


def assert_same(found, truth, size):
    assert float((found - truth).norm()) <= 1e-11 * size


def directions(style, energy):
    """The fewest right singular vectors of the dense matrix that hold the energy."""
    delta = style.delta()
    _, sigma, vh = torch.linalg.svd(delta, full_matrices=False)
    share = sigma.square().cumsum(0) / sigma.square().sum()
    return vh[: int((share < energy - 1e-12).sum()) + 1].T


@few
@given(
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    energy=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    mu=st.sampled_from([0.0, 0.5, 3.0, math.inf]),
    shape=st.sampled_from([(14, 11), (5, 27), (30, 6)]),
    seed=st.integers(0, 99),
)
def test_it_is_the_dense_projection(ranks, energy, mu, shape, seed):
    part, style = factors(ranks[0], seed, shape), factors(ranks[1], seed + 100, shape)
    basis = directions(style, energy)
    share = 1.0 if mu == math.inf else mu / (1 + mu)
    truth = part.delta() @ (torch.eye(shape[1], dtype=COMPUTE) - share * basis @ basis.T)
    found = protected(part, [style], energy, mu)
    assert_same(found.delta(), truth, float(part.delta().norm()))
    assert found.rank == part.rank
    assert torch.equal(found.up, part.up)


def test_the_soft_form_is_the_minimum_it_claims_to_be():
    part, style, mu = factors(3, 1), factors(2, 2), 2.0
    basis = directions(style, 1.0)

    def loss(x):
        return float((x - part.delta()).square().sum() + mu * (x @ basis).square().sum())

    found = protected(part, [style], 1.0, mu).delta()
    for seed in range(10):
        moved = found + 1e-3 * factors(4, 50 + seed).delta()
        assert loss(moved) > loss(found)


def test_what_is_protected_does_to_its_own_inputs_what_it_did():
    part, style = factors(3, 1), factors(4, 2)
    inputs = style.down.T
    together = style.delta() + protected(part, [style]).delta()
    assert_same(together @ inputs, style.delta() @ inputs, float(part.delta().norm() * inputs.norm()))


def test_several_are_protected_together_in_any_order():
    part, styles = factors(5, 1), [factors(2, 2), factors(3, 3), factors(1, 4)]
    found = protected(part, styles).delta()
    for style in styles:
        assert_same(found @ style.down.T, torch.zeros(14, style.rank, dtype=COMPUTE), 100.0)
    assert_same(protected(part, styles[::-1]).delta(), found, float(part.delta().norm()))
    # One projection after the other leaves something of the first: this test could tell.
    after = protected(protected(part, styles[:1]), styles[1:]).delta()
    assert float((after @ styles[0].down.T).norm()) > 1e-3


@pytest.mark.parametrize("mu", [1.0, math.inf])
def test_a_direction_that_two_share_is_removed_once_and_no_other_with_it(mu):
    style, part = factors(2, 2), factors(5, 1)
    mixed = Factors(factors(2, 9).up, torch.randn(2, 2, dtype=COMPUTE) @ style.down)
    alone = protected(part, [style], 1.0, mu).delta()
    assert_same(protected(part, [style, mixed], 1.0, mu).delta(), alone, float(part.delta().norm()))
    assert_same(protected(part, [style, style], 1.0, mu).delta(), alone, float(part.delta().norm()))


def test_itself_or_all_directions_leave_nothing():
    part = factors(3, 1)
    assert_same(protected(part, [part]).delta(), torch.zeros(14, 11, dtype=COMPUTE), 100.0)
    assert_same(protected(part, [factors(11, 2)]).delta(), torch.zeros(14, 11, dtype=COMPUTE), 100.0)
    assert_same(
        protected(part, [factors(7, 2), factors(7, 3)]).delta(), torch.zeros(14, 11, dtype=COMPUTE), 100.0
    )


def test_nothing_to_protect_changes_nothing():
    part = factors(dtype=torch.float16)
    zero = Factors(torch.zeros(14, 2), torch.zeros(2, 11))
    assert protected(part, []) is part
    assert protected(part, [zero]) is part
    assert protected(part, [zero, zero]) is part
    assert protected(part, [factors(2, 1)], mu=0.0) is part


def test_a_rank_deficient_style_protects_only_what_it_has():
    style = factors(2, 2)
    redundant = Factors(torch.cat([style.up, style.up], dim=1), torch.cat([style.down, style.down]))
    assert leading(redundant, 1.0).shape == (11, 2)
    part = factors(3, 1)
    assert_same(
        protected(part, [redundant]).delta(), protected(part, [style]).delta(), float(part.delta().norm())
    )


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_size_of_the_style_is_of_no_matter(scale):
    part, style = factors(3, 1), factors(4, 2)
    scaled = Factors(style.up * scale, style.down)
    assert_same(
        protected(part, [scaled], 0.6, 4.0).delta(),
        protected(part, [style], 0.6, 4.0).delta(),
        float(part.delta().norm()),
    )


def test_half_precision_is_widened():
    part, style = factors(3, 1, dtype=torch.float16), factors(4, 2, dtype=torch.bfloat16)
    found = protected(part, [style])
    assert found.down.dtype == COMPUTE
    assert float((found.delta() @ style.down.double().T).norm()) < 1e-10


def test_what_cannot_be_protected_is_refused():
    part, broken = factors(3, 1), factors(2, 2)
    broken.down[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        protected(part, [broken])
    with pytest.raises(ShapeError, match=r"\(14, 11\).*\(14, 12\)"):
        protected(part, [factors(shape=(14, 12))])
    for energy in (0.0, 1.5, math.nan):
        with pytest.raises(OptionError, match=r"energy.*\(0, 1\]"):
            protected(part, [factors(2, 2)], energy)
    for mu in (-1.0, math.nan):
        with pytest.raises(OptionError, match="at least 0"):
            protected(part, [factors(2, 2)], 1.0, mu)
