"""How low-rank matrices relate, against dense matrices and scipy's principal angles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from loratools.errors import NonFiniteError
from loratools.maths import overlap
from loratools.maths.lowrank import COMPUTE, Factors


def made(shape=(14, 11), ranks=(2, 5, 1), seed=0, dtype=COMPUTE):
    generator = torch.Generator().manual_seed(seed)
    return [
        Factors(
            torch.randn(shape[0], rank, generator=generator, dtype=COMPUTE).to(dtype),
            torch.randn(rank, shape[1], generator=generator, dtype=COMPUTE).to(dtype),
        )
        for rank in ranks
    ]


def basis(n, k, seed=0):
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=COMPUTE)).Q


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, COMPUTE])
# One matrix; so many columns that the matrices themselves are multiplied, whole and a few rows at a time; and several
# blocks of columns, one matrix of which is wider than a block by itself.
@pytest.mark.parametrize(
    ("ranks", "shape"),
    [
        ((3,), (14, 11)),
        ((2, 5, 1, 20), (14, 11)),
        ((800, 700, 1), (2000, 1000)),
        ((300, 200, 600, 1, 250), (1400, 1400)),
    ],
)
def test_inner_products_are_those_of_the_matrices(ranks, shape, dtype):
    parts = made(shape, ranks, dtype=dtype)
    scales = [(-1.0) ** index * (0.5 + index) for index in range(len(ranks))]
    deltas = [scale * part.delta().flatten() for part, scale in zip(parts, scales, strict=True)]
    found = overlap.gram(parts, scales)
    wanted = torch.stack([torch.stack([one @ other for other in deltas]) for one in deltas])
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-9 * float(wanted.abs().max()))
    assert torch.equal(found, found.T)


def test_nothing_has_no_inner_products():
    assert overlap.gram([], []).shape == (0, 0)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, -2.0)])
def test_the_difference_is_that_of_the_matrices(scales):
    one, other = made(ranks=(2, 7))
    wanted = float((scales[0] * one.delta() - scales[1] * other.delta()).norm())
    assert overlap.difference(one, other, scales) == pytest.approx(wanted, rel=1e-12)


def test_two_spellings_of_one_matrix_differ_by_rounding_alone():
    (one,) = made(shape=(60, 50), ranks=(8,))
    turn = torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=COMPUTE)
    other = Factors(one.up @ turn * 1e3, torch.linalg.inv(turn) @ one.down)
    size = float(one.delta().norm())
    assert overlap.difference(one, other, (1.0, 1e-3)) < 1e-12 * size
    # What the difference can tell and subtracting squares could not.
    nudged = Factors(one.up * (1.0 + 1e-10), one.down)
    assert overlap.difference(one, nudged) == pytest.approx(1e-10 * size, rel=1e-3)


@pytest.mark.parametrize(("p", "q"), [(1, 1), (3, 3), (2, 5), (5, 2), (9, 7)])
def test_angles_are_those_of_scipy(p, q):
    one, other = basis(12, p, 1), basis(12, q, 2)
    found = overlap.principal_angles(one, other)
    wanted = np.sort(scipy.linalg.subspace_angles(one.numpy(), other.numpy()))
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)


def test_a_small_angle_keeps_its_digits():
    frame = basis(10, 3)
    one = frame[:, :2]
    other = torch.stack([frame[:, 0], math.cos(1e-9) * frame[:, 1] + math.sin(1e-9) * frame[:, 2]], dim=1)
    found = overlap.principal_angles(one, other)
    assert float(found[0]) < 1e-15
    assert float(found[1]) == pytest.approx(1e-9, rel=1e-5)


def test_shared_squares_are_those_of_the_principal_angles():
    bases = [basis(12, width, seed) for seed, width in enumerate((3, 1, 5, 0, 9))]
    found = overlap.shared_squares(bases)
    for first, one in enumerate(bases):
        for second, other in enumerate(bases):
            wanted = 0.0
            if one.shape[1] and other.shape[1]:
                wanted = float(np.sum(np.cos(scipy.linalg.subspace_angles(one.numpy(), other.numpy())) ** 2))
            assert float(found[first, second]) == pytest.approx(wanted, abs=1e-12)


def test_a_space_within_another_is_shared_wholly_and_one_across_not_at_all():
    frame = basis(10, 6)
    found = overlap.shared_squares([frame[:, :2], frame[:, :5], frame[:, 2:]])
    assert float(found[0, 1]) == pytest.approx(2.0, abs=1e-13)
    assert float(found[0, 2]) == pytest.approx(0.0, abs=1e-13)


def test_random_spaces_share_what_is_said():
    found = [
        float(overlap.shared_squares([basis(20, 3, 2 * seed), basis(20, 5, 2 * seed + 1)])[0, 1])
        for seed in range(300)
    ]
    assert np.mean(found) == pytest.approx(3 * 5 / 20, abs=0.045)


@pytest.mark.parametrize("shape", [(14, 11), (3, 20), (20, 3)])
def test_spaces_are_the_matrix_and_nothing_else(shape):
    (part,) = made(shape, ranks=(5,))
    doubled = Factors(torch.cat([part.up, part.up], dim=1), torch.cat([part.down, 2.0 * part.down]))
    found = overlap.space_of(doubled)
    rank = min(5, *shape)
    assert found.rank == rank
    eye = torch.eye(rank, dtype=COMPUTE)
    torch.testing.assert_close(found.columns.T @ found.columns, eye, atol=1e-10, rtol=0.0)
    torch.testing.assert_close(found.rows.T @ found.rows, eye, atol=1e-10, rtol=0.0)
    torch.testing.assert_close(found.factors.delta(), 3.0 * part.delta())
    torch.testing.assert_close(found.sigma, torch.linalg.svdvals(doubled.delta())[:rank])


def test_a_matrix_that_cancels_has_no_space():
    (part,) = made(ranks=(3,))
    for zero in (
        Factors(torch.cat([part.up, -part.up], dim=1), torch.cat([part.down, part.down])),
        Factors(torch.zeros_like(part.up), part.down),
    ):
        found = overlap.space_of(zero)
        assert found.rank == 0
        assert found.factors.shape == zero.shape
        assert not found.factors.delta().any()


def test_the_space_of_nan_is_refused():
    (part,) = made(ranks=(3,))
    part.up[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        overlap.space_of(part)


def test_sign_sums_are_those_over_elements():
    tiles = [part.delta() for part in made(ranks=(2, 5, 1))]
    found = overlap.sign_sums(tiles)
    for first, one in enumerate(tiles):
        for second, other in enumerate(tiles):
            opposite = total = 0.0
            for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True):
                total += abs(a * b)
                opposite += abs(a * b) if a * b < 0.0 else 0.0
            assert float(found.opposite[first, second]) == pytest.approx(opposite, rel=1e-11, abs=1e-11)
            assert float(found.total[first, second]) == pytest.approx(total, rel=1e-11)


def test_sampled_rows_belong_to_the_name():
    found = overlap.sampled_rows("blocks.3.to_q", 1000, 64)
    assert len(set(found.tolist())) == 64
    assert found.tolist() == sorted(found.tolist())
    assert int(found.max()) < 1000
    assert torch.equal(found, overlap.sampled_rows("blocks.3.to_q", 1000, 64))
    assert not torch.equal(found, overlap.sampled_rows("blocks.4.to_q", 1000, 64))
    assert overlap.sampled_rows("blocks.3.to_q", 5, 64).tolist() == [0, 1, 2, 3, 4]
