"""Trimming from tiles equals sorting the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NonFiniteError, OptionError
from loratools.maths import _bracket, sparsify
from loratools.maths.sparsify import band_cut, kept_count, magnitude_cut, places_in_rows
from loratools.maths.thinning import row_probabilities, thinned, thinned_by_rank

few = settings(max_examples=30, deadline=None, derandomize=True)


def tiles_of(matrix, height):
    return lambda: ((start, matrix[start : start + height]) for start in range(0, matrix.shape[0], height))


def mask_by_tiles(matrix, density, height):
    cut = magnitude_cut(tiles_of(matrix, height), matrix.numel(), density)
    return torch.cat([cut.kept(start, tile) for start, tile in tiles_of(matrix, height)()])


def mask_by_sorting(matrix, density):
    """Sort all magnitudes, the first position first among equals, and keep the top."""
    flat = matrix.abs().flatten()
    order = torch.sort(flat, descending=True, stable=True).indices
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[order[: kept_count(density, flat.numel())]] = True
    return mask.view(matrix.shape)


@few
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    density=st.floats(0.01, 1.0),
    levels=st.sampled_from([1, 3, 50, None]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_any_tiling_keeps_what_sorting_keeps(shape, density, levels, dtype, seed):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if levels is not None:
        # Few distinct magnitudes, zero among them: many ties.
        matrix = (matrix * levels / 3).round()
    matrix = matrix.to(dtype)
    expected = mask_by_sorting(matrix, density)
    for height in (1, 7, shape[0]):
        assert torch.equal(mask_by_tiles(matrix, density, height), expected)


@few
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    density=st.floats(0.01, 1.0),
    levels=st.sampled_from([1, 3, 50, None]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_trimmed_is_what_the_mask_keeps(shape, density, levels, dtype, seed):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = (matrix if levels is None else (matrix * levels / 3).round()).to(dtype)
    numel = matrix.numel()
    for chosen in (magnitude_cut, lambda *given: band_cut(*given, 0.1)):
        cut = chosen(tiles_of(matrix, 3), numel, density)
        for height in (1, 7):
            for start, tile in tiles_of(matrix, height)():
                before = tile.clone()
                assert torch.equal(cut.trimmed(start, tile), torch.where(cut.kept(start, tile), tile, 0.0))
                assert torch.equal(tile, before)


@pytest.mark.parametrize("kind", ["columns", "rows", "block", "normal", "column"])
@pytest.mark.parametrize("density", [1e-5, 0.003, 0.2, 0.9999])
def test_large_matrices_are_cut_where_sorting_cuts_them(kind, density):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(210, 512, generator=generator, dtype=torch.float64)
    if kind == "columns":
        matrix *= torch.logspace(0, -9, 512, dtype=torch.float64)
    elif kind == "rows":
        matrix *= torch.logspace(0, -9, 210, dtype=torch.float64)[:, None]
    elif kind == "block":
        matrix[:150, 60:] *= 1e-12
    elif kind == "column":
        matrix[:, 1:] = 0.0
    assert torch.equal(mask_by_tiles(matrix, density, 50), mask_by_sorting(matrix, density))


def test_a_sample_that_misleads_changes_nothing(monkeypatch):
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = mask_by_sorting(matrix, 0.3)
    for low, high in ((2.0, 2.1), (0.0, 0.1), (0.5, math.inf), (3.0, 3.0)):
        monkeypatch.setattr(_bracket, "_bracket", lambda _sample, _share, ends=(low, high): ends)
        assert torch.equal(mask_by_tiles(matrix, 0.3, 7), expected)


def test_a_sample_meets_every_column():
    matrix = torch.arange(64 * 64, dtype=torch.float64).view(64, 64) % 64
    assert _bracket.sample(tiles_of(matrix, 5), matrix.numel()).unique().numel() == 64
    assert torch.equal(
        _bracket.sample(tiles_of(matrix, 5), matrix.numel()),
        _bracket.sample(tiles_of(matrix, 64), matrix.numel()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["distinct", "near", "equal", "two", "zero", "wide"])
def test_digits_are_refined_where_a_bin_holds_too_many(monkeypatch, kind, dtype):
    monkeypatch.setattr(sparsify, "_COLLECT", 4)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(23, 19, generator=generator, dtype=torch.float64)
    matrix = {
        "distinct": random,
        "near": 1 + random * 1e-5,
        "equal": random.sign() * 0.3,
        "two": torch.where(random > 0, 0.5, -0.25),
        "zero": torch.where(random > 1, random, 0.0),
        "wide": random * 10.0 ** (random * 12),
    }[kind].to(dtype)
    for density in (0.001, 0.2, 0.5, 0.999):
        expected = mask_by_sorting(matrix, density)
        for height in (1, 7, 23):
            assert torch.equal(mask_by_tiles(matrix, density, height), expected)


@pytest.mark.parametrize(
    ("density", "numel", "count"),
    [(1.0, 10, 10), (0.2, 10, 2), (0.25, 10, 3), (0.35, 10, 4), (0.01, 10, 1), (0.24, 10, 2), (1e-9, 7, 1)],
)
def test_how_many_are_kept(density, numel, count):
    assert kept_count(density, numel) == count


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_densities_outside_the_range_are_refused(density):
    with pytest.raises(OptionError, match=r"\(0, 1\]"):
        kept_count(density, 10)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_are_refused(value):
    with pytest.raises(NonFiniteError):
        magnitude_cut(tiles_of(torch.tensor([[1.0, value]]), 1), 2, 0.5)
    late = torch.ones(300, 7)
    late[299, 6] = value
    with pytest.raises(NonFiniteError):
        magnitude_cut(tiles_of(late, 50), late.numel(), 0.5)


@few
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    density=st.floats(0.01, 1.0),
    gamma=st.sampled_from([0.0, 0.02, 0.3, 0.99]),
    levels=st.sampled_from([1, 3, None]),
    seed=st.integers(0, 99),
)
def test_a_band_is_a_stretch_of_the_sorted_matrix(shape, density, gamma, levels, seed):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if levels is not None:
        matrix = (matrix * levels / 3).round()
    numel = matrix.numel()
    kept = kept_count(density, numel)
    removed = min(int(gamma * numel + 0.5), numel - kept)
    order = torch.sort(matrix.abs().flatten(), descending=True, stable=True).indices
    expected = torch.zeros(numel, dtype=torch.bool)
    expected[order[removed : removed + kept]] = True
    for height in (3, shape[0]):
        band = band_cut(tiles_of(matrix, height), numel, density, gamma)
        mask = torch.cat([band.kept(start, tile) for start, tile in tiles_of(matrix, height)()])
        assert torch.equal(mask, expected.view(shape))


@pytest.mark.parametrize("gamma", [-0.1, 1.0, float("nan")])
def test_gammas_outside_the_range_are_refused(gamma):
    with pytest.raises(OptionError, match=r"\[0, 1\)"):
        band_cut(tiles_of(torch.ones(2, 2), 1), 4, 0.5, gamma)


def test_places_in_rows_count_from_the_largest_and_keep_the_order_of_equal_ones():
    tile = torch.tensor([[1.0, -3.0, 0.0, 3.0, -1.0], [2.0, 2.0, -2.0, 5.0, 0.0]])
    assert places_in_rows(tile).tolist() == [[2, 0, 4, 1, 3], [1, 2, 3, 0, 4]]


@pytest.mark.parametrize("count", [1, 2, 7, 640])
@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.2, 0.1), (0.01, 0.1), (0.97, 0.1), (0.5, 1.0), (1.0, 0.3), (0.4, 0.0)]
)
def test_probabilities_of_a_row_descend_evenly_around_the_density(count, density, epsilon):
    found = row_probabilities(count, density, epsilon)
    assert float(found.mean()) == pytest.approx(density, rel=1e-12)
    assert float(found.min()) > 0.0
    assert float(found.max()) <= 1.0
    reach = min(epsilon, 2 * density, 2 * (1 - density)) / count
    steps = found[:-1] - found[1:]
    torch.testing.assert_close(steps, torch.full_like(steps, reach), rtol=0, atol=1e-15)


def test_thinned_tiles_are_parts_of_the_whole():
    matrix = torch.randn(23, 19, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for thin in (
        lambda at, tile: thinned(at, tile, 0.3, 7),
        lambda at, tile: thinned_by_rank(at, tile, 0.3, 0.2, 7),
    ):
        whole = thin(0, matrix)
        assert 0 < int(whole.count_nonzero()) < matrix.numel()
        for height in (1, 7):
            assert torch.equal(
                torch.cat([thin(start, tile) for start, tile in tiles_of(matrix, height)()]), whole
            )


def test_thinning_at_density_one_changes_nothing():
    matrix = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(thinned(0, matrix, 1.0, 3), matrix)
    assert torch.equal(thinned_by_rank(0, matrix, 1.0, 0.5, 3), matrix)
