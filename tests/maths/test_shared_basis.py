"""One basis for many matrices: exact where there is room, optimal for one, never worse with more."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import OptionError, ShapeError
from loratools.maths import shared_basis as module
from loratools.maths.lowrank import Factors
from loratools.maths.shared_basis import SharedBasis, shared_basis, widths


def parts(count: int, ranks: tuple[int, ...] = (2, 3), shape: tuple[int, int] = (9, 12), seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return [
        Factors(draw(shape[0], ranks[n % len(ranks)]), draw(ranks[n % len(ranks)], shape[1]))
        for n in range(count)
    ]


def product(found: SharedBasis, index: int) -> torch.Tensor:
    core = found.cores[index]
    return found.left @ (torch.diag(core) if core.ndim == 1 else core) @ found.right


def errors(given_parts, found: SharedBasis) -> torch.Tensor:
    """By the definition, from dense matrices."""
    deltas = [part.delta() for part in given_parts]
    return torch.stack(
        [(delta - product(found, index)).norm() / delta.norm() for index, delta in enumerate(deltas)]
    )


@pytest.mark.parametrize("diagonal", [False, True])
def test_it_is_exact_where_the_rank_is_the_sum_of_all(diagonal):
    given_parts = parts(4)
    found = shared_basis(given_parts, 10, diagonal=diagonal)
    assert float(errors(given_parts, found).max()) < 1e-7
    for index, part in enumerate(given_parts):
        torch.testing.assert_close(product(found, index), part.delta(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_of_one_matrix_it_is_the_truncated_decomposition(rank):
    (one,) = parts(1, ranks=(5,))
    found = shared_basis([one], rank)
    u, sigma, vh = torch.linalg.svd(one.delta())
    best = u[:, :rank] * sigma[:rank] @ vh[:rank]
    torch.testing.assert_close(product(found, 0), best, rtol=1e-8, atol=1e-8)
    left = torch.linalg.eigh(one.delta() @ one.delta().T).eigenvectors[:, -rank:]
    torch.testing.assert_close(found.left @ found.left.T, left @ left.T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_errors_are_those_of_the_dense_matrices(rank, diagonal):
    given_parts = parts(5)
    found = shared_basis(given_parts, rank, diagonal=diagonal)
    torch.testing.assert_close(found.errors, errors(given_parts, found), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        found.norms, torch.stack([part.delta().norm() for part in given_parts]), rtol=1e-10, atol=0
    )
    assert found.objective[-1] == pytest.approx(float(found.errors.square().sum()), abs=1e-9)


@given(seed=st.integers(0, 10**6), diagonal=st.booleans(), rank=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_the_objective_never_rises(seed, diagonal, rank):
    found = shared_basis(parts(4, seed=seed), rank, diagonal=diagonal)
    assert found.rounds >= 1
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(found.objective))


def test_a_higher_rank_loses_less():
    totals = [float(shared_basis(parts(6), rank).errors.square().sum()) for rank in range(1, 13)]
    assert all(after < before + 1e-9 for before, after in itertools.pairwise(totals))
    assert totals[-1] < 1e-12


def test_its_bases_are_orthonormal_and_its_cores_the_best_ones():
    given_parts = parts(5)
    found = shared_basis(given_parts, 4)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(found.left.T @ found.left, eye)
    torch.testing.assert_close(found.right @ found.right.T, eye)
    for index, part in enumerate(given_parts):
        torch.testing.assert_close(found.cores[index], found.left.T @ part.delta() @ found.right.T)


def test_norms_do_not_decide_whose_error_is_small():
    given_parts = parts(4)
    loud = [Factors(part.up * 10.0**index, part.down) for index, part in enumerate(given_parts)]
    one, other = (shared_basis(each, 5) for each in (given_parts, loud))
    torch.testing.assert_close(one.errors, other.errors, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_zero_matrix_has_a_core_of_zeros_and_no_error(diagonal):
    zero = Factors(torch.zeros(9, 2, dtype=torch.float64), torch.ones(2, 12, dtype=torch.float64))
    found = shared_basis([*parts(2), zero], 3, diagonal=diagonal)
    assert not found.cores[2].any()
    assert float(found.errors[2]) == 0.0
    assert bool(found.cores.isfinite().all())


def test_many_columns_go_by_iteration_and_come_near_the_exact_result(monkeypatch):
    given_parts = parts(8, shape=(20, 24))
    exact = shared_basis(given_parts, 6)
    monkeypatch.setattr(module, "_EXACT", 4)
    found = shared_basis(given_parts, 6)
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(found.objective))
    assert found.objective[-1] == pytest.approx(exact.objective[-1], rel=0.02)


def test_widths_are_no_more_than_can_be_used():
    assert widths((4, 9), 20, 8) == (4, 8)
    assert widths((40, 9), 3, 8) == (3, 3)
    assert widths((4, 9), 20, 8, diagonal=True) == (8, 8)


def test_bad_input_is_named():
    with pytest.raises(OptionError, match="rank 0"):
        shared_basis(parts(1), 0)
    with pytest.raises(OptionError, match="0 matrices"):
        shared_basis([], 2)
    with pytest.raises(ShapeError, match="no basis in common"):
        shared_basis([*parts(1), *parts(1, shape=(8, 12))], 2)
