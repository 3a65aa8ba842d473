"""Trimming from tiles equals sorting the whole matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NonFiniteError, OptionError
from loratools.maths import sparsify
from loratools.maths.sparsify import kept_count, magnitude_cut

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


def test_non_finite_values_are_refused():
    with pytest.raises(NonFiniteError):
        magnitude_cut(tiles_of(torch.tensor([[1.0, torch.nan]]), 1), 2, 0.5)
