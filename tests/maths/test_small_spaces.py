"""Common small spaces, polar factors, grouping of units and boosting, against dense matrices."""

from __future__ import annotations

import itertools

import pytest
import torch

from loratools.errors import NonFiniteError, OptionError
from loratools.maths.boost import boosted
from loratools.maths.knots import knots
from loratools.maths.lowrank import COMPUTE, Factors
from loratools.maths.orthogonal import leading, orthogonal_sum, polar
from loratools.maths.spectra_ops import (
    core_size,
    even,
    flattened,
    full_size_note,
    reduced,
    reduced_aligned,
    spectrum,
)
from loratools.maths.units import grouped, joined

WEIGHTS = [1.0, -0.5, 2.0]


def made(shape=(14, 11), ranks=(2, 3, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Factors(
            torch.randn(shape[0], rank, generator=generator, dtype=COMPUTE),
            torch.randn(rank, shape[1], generator=generator, dtype=COMPUTE),
        )
        for rank in ranks
    ]


def close(found, truth):
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-10)


def eye(size):
    return torch.eye(size, dtype=COMPUTE)


@pytest.mark.parametrize("build", [reduced, reduced_aligned])
@pytest.mark.parametrize("ranks", [(2, 3, 1), (9, 3, 1), (14, 14, 14)])
def test_small_parts_are_the_products(build, ranks):
    parts = made(ranks=ranks)
    space = build(parts, WEIGHTS)
    for part, weight, small in zip(parts, WEIGHTS, space.parts, strict=True):
        close(space.expanded(small).delta(), weight * part.delta())
    assert space.shape == (min(14, sum(min(rank, 11) for rank in ranks)), min(11, sum(ranks)))
    for basis in (space.left, space.right):
        if basis is not None:
            close(basis.T @ basis, eye(basis.shape[1]))


def test_a_side_that_is_spanned_whole_needs_no_basis():
    space = reduced(made(ranks=(6, 6)), [1.0, 1.0])
    assert space.right is None
    assert space.left is not None


def test_aligned_bases_do_not_depend_on_order_or_balance():
    parts = made()
    space = reduced_aligned(parts, WEIGHTS)
    uneven = [Factors(part.up * 8, part.down / 8) for part in parts]
    again = reduced_aligned(uneven[::-1], WEIGHTS[::-1])
    for small, other in zip(space.parts, again.parts[::-1], strict=True):
        close(small.delta(), other.delta())


@pytest.mark.parametrize("build", [reduced, reduced_aligned])
def test_spaces_refuse_nan(build):
    parts = made()
    parts[0].up[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        build(parts, WEIGHTS)


def test_aligned_bases_hold_no_direction_twice():
    parts = made(ranks=(2, 3))
    again = reduced_aligned([*parts, *parts], [1.0, 1.0, 2.0, -1.0])
    assert again.shape == (5, 5)
    assert reduced_aligned([Factors(part.up * 0, part.down) for part in parts], [1.0, 1.0]).shape == (1, 1)


def test_even_keeps_the_product_and_splits_its_magnitude():
    part = made(ranks=(4,))[0]
    skewed = Factors(part.up * 1e6, part.down)
    found = even(skewed, -0.25)
    close(found.delta() / 1e6, -0.25 * part.delta())
    close(found.up.norm(dim=0), found.down.norm(dim=1))


def test_spectrum_is_that_of_the_matrix_at_its_numerical_rank():
    part = made(ranks=(3,))[0]
    found = spectrum(Factors(torch.cat([part.up, part.up], dim=1), torch.cat([part.down, part.down])))
    close(found.sigma, 2 * torch.linalg.svdvals(part.delta())[:3])
    close(found.u * found.sigma @ found.vh, 2 * part.delta())
    close(found.u.T @ found.u, eye(3))
    nothing = spectrum(Factors(torch.cat([part.up, -part.up], dim=1), torch.cat([part.down, part.down])))
    assert (nothing.sigma.numel(), nothing.u.shape, nothing.vh.shape) == (0, (14, 0), (0, 11))
    assert flattened(nothing, 1.0).factors.delta().abs().sum() == 0.0


@pytest.mark.parametrize("level", [2.0, -0.5])
def test_flattened_has_one_singular_value(level):
    found = spectrum(made(ranks=(4,))[0])
    flat = flattened(found, level, 3)
    close(flat.factors.delta(), level * found.u[:, :3] @ found.vh[:3])
    assert flat.energy == 0.75
    assert flat.square == pytest.approx(3 * level**2)
    assert flattened(found, level).energy == 1.0


def test_core_size_counts_what_fits_and_what_there_is():
    parts = [even(part, 1.0) for part in made(ranks=(2, 3))]
    zero = even(Factors(parts[0].up * 0, parts[0].down), 1.0)
    assert core_size(parts) == core_size([*parts, zero]) == 5
    assert core_size([even(part, 1.0) for part in made(ranks=(8, 9))]) == 11
    assert core_size([zero]) == 1


def test_a_full_space_is_told():
    assert full_size_note(made(ranks=(5, 5))) == ""
    assert full_size_note(made(ranks=(5, 6))).startswith("the ranks add up to 11 of 11")


@pytest.mark.parametrize("shape", [(12, 5), (5, 5), (4, 9)])
def test_polar_is_the_nearest_orthonormal_matrix(shape):
    columns = made((shape[0], shape[1]), (4,))[0].delta() + eye(max(shape))[: shape[0], : shape[1]]
    found = polar(columns)
    small = min(shape)
    gram = found.T @ found if shape[0] >= shape[1] else found @ found.T
    close(gram, eye(small))
    # X = Q·H with a symmetric and positive semidefinite H is what makes Q the polar factor.
    inner = found.T @ columns
    close(inner, inner.T)
    assert float(torch.linalg.eigvalsh(inner).min()) > -1e-10
    close(found @ inner, columns)


def test_polar_takes_equal_directions_once():
    columns = torch.linalg.qr(made((9, 3), (3,))[0].delta()).Q
    twice = polar(torch.cat([columns, columns + 1e-12], dim=1))
    close(twice[:, :3], columns / 2**0.5)
    close(twice @ twice.T, columns @ columns.T)


@pytest.mark.parametrize(("alike", "ratio"), [(0.0, 0.9), (0.99999, 1e-5)])
def test_polar_of_many_columns_is_orthonormal_however_alike_they_are(alike, ratio):
    columns = torch.nn.functional.normalize(made((200, 40), (40,))[0].delta(), dim=0)
    columns = torch.nn.functional.normalize((1 - alike) * columns + alike * columns[:, :1], dim=0)
    assert float(torch.linalg.svdvals(columns)[-1]) < ratio
    found = polar(columns)
    torch.testing.assert_close(found.T @ found, eye(40), rtol=0, atol=1e-12)
    u, _, vh = torch.linalg.svd(columns, full_matrices=False)
    torch.testing.assert_close(found, u @ vh, rtol=0, atol=1e-8 if alike else 1e-12)


def test_an_orthogonal_sum_of_orthogonal_matrices_is_their_sum():
    up, down = (
        torch.linalg.qr(torch.randn(10, 5, dtype=COMPUTE, generator=torch.Generator().manual_seed(1))).Q,
        eye(8),
    )
    parts = [Factors(up[:, :2], 3 * down[:2]), Factors(up[:, 2:], down[4:7])]
    found = orthogonal_sum([spectrum(part) for part in parts])
    close(found.delta(), parts[0].delta() + parts[1].delta())
    close(found.up.norm(dim=0), torch.tensor([3.0, 3, 1, 1, 1], dtype=COMPUTE).sqrt())
    level = orthogonal_sum([spectrum(part) for part in parts], 0.5)
    close(torch.linalg.svdvals(level.delta())[:5], torch.full((5,), 0.5, dtype=COMPUTE))
    nothing = spectrum(Factors(up[:, :1] * 0, down[:1]))
    assert orthogonal_sum([nothing, nothing]).delta().abs().sum() == 0.0


def test_leading_terms_and_what_they_retain():
    up = eye(6)[:, :3]
    found = leading(Factors(up, torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=COMPUTE)) @ eye(5)[:3]), 2)
    assert (found.factors.rank, found.energy) == (2, pytest.approx(13 / 14))
    close(found.sigma, torch.tensor([3.0, 2.0], dtype=COMPUTE))
    assert leading(Factors(up, eye(5)[:3]), 9).energy == 1.0
    assert leading(Factors(up * 0, eye(5)[:3]), 1).energy == 1.0


@pytest.mark.parametrize("ranks", [(2, 3, 1), (9, 8, 7)])
def test_knots_are_the_singular_vectors_of_the_concatenation(ranks):
    parts = made(ranks=ranks)
    tied = knots(parts, WEIGHTS)
    dense = torch.cat([weight * part.delta() for part, weight in zip(parts, WEIGHTS, strict=True)], dim=1)
    u, sigma, _ = torch.linalg.svd(dense, full_matrices=False)
    kept = min(14, sum(ranks))
    assert tied.basis.shape == (14, kept)
    together = torch.cat([part.delta() for part in tied.parts], dim=1)
    close(tied.basis @ together, dense)
    close(together.norm(dim=1), sigma[:kept])
    close((tied.basis.T @ u[:, :kept]).abs(), eye(kept))


def test_groups_are_found_up_to_sign():
    lines = eye(6)[:3] * torch.tensor([[3.0], [2.0], [1.0]], dtype=COMPUTE)
    units = torch.cat([lines, -1.1 * lines, 0.9 * lines])
    members = grouped(units @ units.T, 3, 7)
    assert members.shape == (9, 3)
    for line in range(3):
        own = members[[line, line + 3, line + 6]]
        assert int((own.abs().sum(dim=0) == 3).sum()) == 1
        column = own[:, own.abs().sum(dim=0) == 3].flatten()
        assert column[0] == column[2] == -column[1]
    assert grouped(units[:1] @ units[:1].T, 4, 7).shape == (1, 1)
    assert grouped(eye(5), 5, 7).abs().sum() == 5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_groups_lose_as_little_as_any_others(count):
    units = made((5, 4), (4,), 3)[0].up
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=5)), dtype=COMPUTE)

    def losses(labels):
        """Of every choice of signs: the sum over groups of Σ‖x‖² − ‖Σ ±x‖² / size."""
        group = torch.nn.functional.one_hot(torch.tensor(labels), count).to(COMPUTE)
        sums = torch.einsum("su,uk,ud->skd", signs, group, units).square().sum(dim=2)
        return units.square().sum() - (sums / group.sum(dim=0).clamp(min=1.0)).sum(dim=1)

    best = min(float(losses(labels).min()) for labels in itertools.product(range(count), repeat=5))
    members = grouped(units @ units.T, count, 0)
    centres = members.T @ units / members.abs().sum(dim=0)[:, None]
    assert float((units - members @ centres).square().sum()) == pytest.approx(best, rel=1e-9)


def test_a_joined_unit_is_as_large_as_its_members_are():
    units = torch.tensor([[2.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 1.0], [-4.0, 0.0, -4.0, 0.0]], dtype=COMPUTE)
    members = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=COMPUTE)
    plus = torch.ones(3, dtype=COMPUTE)
    close(joined(units, members, 2, plus), torch.tensor([[3.0, 0, 3, 0], [0, 1, 0, 1]], dtype=COMPUTE))
    found = joined(units, members, 2, torch.tensor([1.0, -1.0, -1.0], dtype=COMPUTE))
    close(found, torch.tensor([[-1.8, 0, 3, 0], [0, -1, 0, 1]], dtype=COMPUTE))
    # By the largest entry and not by length: of 3 and 4 the mean is 3.5.
    units = torch.tensor([[3.0, 0.0, 0.0, 3.0], [0.0, -4.0, 0.0, 0.0]], dtype=COMPUTE)
    whole = joined(units, torch.ones(2, 1, dtype=COMPUTE), 2, plus[:2])
    close(whole, torch.tensor([[2.625, -3.5, 0, 2.625]], dtype=COMPUTE))


@pytest.mark.parametrize(
    ("share", "raised"),
    [
        (0.0, [4, 4, 4, 4]),
        (0.4, [4, 4, 4, 4]),
        (0.41, [4, 3, 3, 3]),
        (0.9, [4, 3, 2, 2]),
        (1.0, [4, 3, 2, 1]),
    ],
)
def test_boosting_raises_what_lies_beyond_a_share_of_all_singular_values(share, raised):
    generator = torch.Generator().manual_seed(2)
    u = torch.linalg.qr(torch.randn(9, 4, generator=generator, dtype=COMPUTE)).Q
    v = torch.linalg.qr(torch.randn(7, 4, generator=generator, dtype=COMPUTE)).Q
    sigma = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=COMPUTE)
    # A redundant column: the rank of the factors is not that of the matrix, and nothing is boosted for it.
    factors = Factors(torch.cat([u * sigma, u[:, :1]], dim=1), torch.cat([v.T, 0 * v.T[:1]]))
    found = boosted(factors, share)
    close(found.delta(), u @ torch.diag(torch.tensor(raised, dtype=COMPUTE)) @ v.T)
    assert found.rank == 4


def test_boosting_nothing_gives_nothing_and_shares_are_checked():
    zero = Factors(torch.zeros(5, 2), torch.zeros(2, 4))
    assert boosted(zero, 0.5).delta().abs().sum() == 0.0
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(OptionError, match=r"\[0, 1\]"):
            boosted(zero, share)
