"""Compression from tiles comes close to the best, and says exactly how close."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import NonFiniteError, OptionError
from loratools.maths import tiles
from loratools.maths.lowrank import COMPUTE, Factors
from loratools.maths.randomized import compress_operator
from loratools.maths.tiles import grouped, held, product, tile_height


def tiles_of(matrix, height=50):
    starts = range(0, matrix.shape[0], height)
    return lambda: ((start, matrix[start : start + height]) for start in starts)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=COMPUTE, generator=torch.Generator().manual_seed(seed))


def trimmed(out, rank, inner, density):
    """A low-rank product of which only the largest entries are left: the flat tail that trimming makes."""
    matrix = gaussian(out, rank) @ gaussian(rank, inner, seed=1)
    limit = matrix.abs().flatten().kthvalue(int((1 - density) * matrix.numel())).values
    return torch.where(matrix.abs() > limit, matrix, 0.0)


def decaying(size, power):
    left, right = (torch.linalg.qr(gaussian(size, size, seed=seed)).Q for seed in (2, 3))
    return left * torch.arange(1, size + 1, dtype=COMPUTE) ** -power @ right


MATRICES = {
    "trimmed": trimmed(320, 16, 260, 0.2),
    "sparse": trimmed(260, 4, 400, 0.02),
    "signs": gaussian(300, 240).sign(),
    "noise": gaussian(240, 300),
    "decaying": decaying(250, 0.7),
    "steep": decaying(250, 2.0),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_energy_is_within_one_percent_of_the_best_and_exact(name, rank):
    matrix = MATRICES[name]
    energies = torch.linalg.svdvals(matrix).square()
    found = compress_operator(tiles_of(matrix), tuple(matrix.shape), rank)
    assert found.factors.rank == rank
    best = float(energies[:rank].sum() / energies.sum())
    assert 0.99 * best <= found.energy <= best * (1 + 1e-12)
    lost = float((matrix - found.factors.delta()).square().sum() / energies.sum())
    assert found.energy == pytest.approx(1 - lost, abs=1e-10)


@pytest.mark.parametrize("shape", [(200, 150), (150, 200), (30, 200), (200, 12)])
def test_a_matrix_of_low_rank_is_found_exactly(shape):
    factors = Factors(gaussian(shape[0], 6), gaussian(6, shape[1], seed=1))
    found = compress_operator(product(factors), shape, 9)
    assert found.factors.rank == 6
    assert found.energy == pytest.approx(1.0, abs=1e-12)
    truth = factors.delta()
    assert float((found.factors.delta() - truth).norm() / truth.norm()) < 1e-10


def test_a_small_matrix_is_decomposed_exactly():
    matrix = gaussian(24, 90)
    energies = torch.linalg.svdvals(matrix).square()
    found = compress_operator(tiles_of(matrix, 7), (24, 90), 5)
    assert found.energy == pytest.approx(float(energies[:5].sum() / energies.sum()), rel=1e-12)
    assert compress_operator(tiles_of(matrix, 7), (24, 90), 60).factors.rank == 24


def test_zero_matrix():
    for size in (8, 120):
        found = compress_operator(tiles_of(torch.zeros(size, size, dtype=COMPUTE)), (size, size), 4)
        assert (found.factors.rank, found.energy) == (1, 1.0)
        assert not found.factors.delta().any()


def test_the_seed_decides():
    matrix = MATRICES["noise"]
    first, again, other = (
        compress_operator(tiles_of(matrix), tuple(matrix.shape), 4, seed=seed).factors for seed in (1, 1, 2)
    )
    assert torch.equal(first.up, again.up)
    assert not torch.equal(first.up, other.up)


def test_refusals():
    with pytest.raises(OptionError):
        compress_operator(tiles_of(MATRICES["noise"]), (240, 300), 0)
    for size in (10, 100):
        matrix = torch.full((size, size), torch.nan, dtype=COMPUTE)
        with pytest.raises(NonFiniteError):
            compress_operator(tiles_of(matrix), (size, size), 2)


def test_product_tiles_are_the_product_bit_for_bit_in_every_sweep():
    factors = Factors(gaussian(700, 5).half(), gaussian(5, 900).half())
    height = tile_height(factors.shape)
    assert 1 < height < 700
    sweep = product(factors)
    first = list(sweep())
    assert [start for start, _ in first] == list(range(0, 700, height))
    for (start, one), (_, other) in zip(first, sweep(), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, factors.delta()[start : start + height], rtol=1e-12, atol=1e-12)


def test_only_small_matrices_are_held():
    factors = Factors(gaussian(30, 2), gaussian(2, 20))
    size = 30 * 20 * 8
    kept, streamed = (held(product(factors), factors.shape, limit) for limit in (size, size - 1))
    assert next(kept())[1] is next(kept())[1]
    assert next(streamed())[1] is not next(streamed())[1]


@pytest.mark.parametrize("elements", [1, 40, 1000])
def test_groups_are_whole_tiles_in_order(monkeypatch, elements):
    monkeypatch.setattr(tiles, "_GROUP_ELEMENTS", elements)
    matrix = gaussian(23, 6)
    found = list(grouped(tiles_of(matrix, 4))())
    assert torch.equal(torch.cat([tile for _, tile in found]), matrix)
    at = 0
    for start, tile in found:
        assert start == at
        at += tile.shape[0]
        assert tile.numel() >= elements or at == 23
    assert len(found) == {1: 6, 40: 3, 1000: 1}[elements]
