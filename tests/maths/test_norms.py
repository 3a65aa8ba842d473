"""Norms from the factors equal those of the dense ΔW."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import ShapeError
from loratools.maths.norms import spectra, spectrum, summarise

TOLERANCE = {"float16": 1e-5, "bfloat16": 1e-5, "float32": 1e-12, "float64": 1e-12}
NOISE = {"float16": 1e-3, "bfloat16": 1e-3, "float32": 1e-7, "float64": 1e-7}
few = settings(max_examples=25, deadline=None, derandomize=True)


def stored(array, dtype):
    """The array as a file would hold it; bfloat16 (truncated) as its bits."""
    if dtype == "bfloat16":
        return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(dtype)


def wide(array):
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def dense(up, down):
    return np.linalg.svd(wide(up) @ wide(down), compute_uv=False)[
        : min(up.shape[1], up.shape[0], down.shape[1])
    ]


def assert_spectrum(up, down, dtype):
    truth, found = dense(up, down), spectrum(up, down)
    assert found.shape == truth.shape
    assert found.dtype == np.float64
    assert np.all(np.diff(found) <= 0)
    assert found[0] == pytest.approx(truth[0], rel=TOLERANCE[dtype])
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(truth), rel=TOLERANCE[dtype])
    np.testing.assert_allclose(found, truth, rtol=0, atol=NOISE[dtype] * truth[0])


@few
@given(
    out=st.integers(1, 70),
    inner=st.integers(1, 70),
    rank=st.integers(1, 50),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
def test_spectrum_equals_dense_for_any_shape_and_dtype(out, inner, rank, dtype, seed):
    random = np.random.default_rng(seed)
    up = stored(random.standard_normal((out, rank)), dtype)
    down = stored(random.standard_normal((rank, inner)), dtype)
    assert_spectrum(up, down, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1280, 32, 640), (3001, 16, 97), (640, 64, 640), (600, 520, 700)])
def test_spectrum_of_usual_widths(shape, dtype):
    random = np.random.default_rng(1)
    # Values of one sign are the worst case for a sum in float32; a decaying spectrum is the usual one.
    up = stored(random.random(shape[:2]) * 0.02 * np.arange(1, shape[1] + 1) ** -0.5, dtype)
    down = stored(random.standard_normal(shape[1:]) * 0.05, dtype)
    assert_spectrum(up, down, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_zero_up_has_no_norm_and_no_rank(dtype):
    down = stored(np.random.default_rng(0).standard_normal((8, 30)), dtype)
    sigma = spectrum(stored(np.zeros((20, 8)), dtype), down)
    assert np.array_equal(sigma, np.zeros(8))
    norms = summarise(sigma, 2.0)
    assert (norms.frobenius, norms.spectral, norms.stable_rank, norms.effective_rank) == (0, 0, 0, 0)
    assert norms.energy == {1: 1.0, 2: 1.0, 4: 1.0}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rank_deficient_factors(dtype):
    random = np.random.default_rng(2)
    up = random.standard_normal((40, 12))
    down = random.standard_normal((12, 33))
    up[:, 6:] = up[:, :6]
    down[3] = 0.0
    down[5] = down[4]
    assert_spectrum(stored(up, dtype), stored(down, dtype), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_terms_that_cancel(dtype):
    random = np.random.default_rng(3)
    up, down = random.standard_normal((50, 4)), random.standard_normal((4, 60))
    # The sum of A and of -A but for a hundredth, at rank 8.
    up = stored(np.hstack([up, up]), dtype)
    down = stored(np.vstack([down, -0.99 * down]), dtype)
    assert_spectrum(up, down, dtype)


def test_columns_of_very_different_length():
    random = np.random.default_rng(4)
    scale = 10.0 ** np.arange(-4, 4)
    up, down = random.standard_normal((90, 8)) * scale, random.standard_normal((8, 70)) / scale[:, None]
    assert_spectrum(up.astype(np.float32), down.astype(np.float32), "float32")


@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e30), ("float32", 1e-30), ("float64", 1e140)])
def test_extreme_magnitudes_neither_overflow_nor_vanish(dtype, size):
    random = np.random.default_rng(5)
    up, down = random.standard_normal((30, 5)), random.standard_normal((5, 20))
    plain = spectrum(up, down)
    found = spectrum((up * size).astype(dtype), (down * size).astype(dtype))
    np.testing.assert_allclose(found / size / size, plain, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_bfloat16(size):
    random = np.random.default_rng(6)
    up = stored(random.standard_normal((30, 5)) * size, "bfloat16")
    down = stored(random.standard_normal((5, 20)), "bfloat16")
    assert_spectrum(up, down, "bfloat16")


def test_every_float16_is_read_exactly():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    # One row and one column each: σ is |a|·|b|, and float32 squares of float16 are exact.
    for value in (*every[::97], np.float16(6e-8), np.float16(65504), np.float16(-0.0)):
        sigma = spectrum(np.array([[value]]), np.ones((1, 1), np.float16))
        assert sigma[0] == abs(float(value))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_factors_have_no_norms(dtype, value):
    up = np.ones((6, 2))
    up[4, 1] = value
    sigma = spectrum(stored(up, dtype), stored(np.ones((2, 7)), dtype))
    assert np.isnan(sigma).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_strides_and_writability_do_not_matter(dtype):
    random = np.random.default_rng(7)
    up, down = random.standard_normal((41, 6)), random.standard_normal((6, 52))
    up, down = stored(up, dtype), stored(down, dtype)
    plain = spectrum(up, down)
    spread = np.zeros((82, 18), up.dtype)
    spread[::2, ::3] = up
    for other_up in (np.asfortranarray(up), spread[::2, ::3], up[::-1]):
        other_up.flags.writeable = False
        np.testing.assert_allclose(spectrum(other_up, down), plain, rtol=1e-5)
    np.testing.assert_allclose(spectrum(up, np.asfortranarray(down)), plain, rtol=1e-5)


def test_spectra_keeps_order_and_equals_one_by_one():
    random = np.random.default_rng(8)
    shapes = [(random.integers(1, 40), random.integers(1, 9), random.integers(1, 40)) for _ in range(150)]
    dtypes = [list(TOLERANCE)[index % 4] for index in range(150)]
    pairs = [
        (stored(random.standard_normal((m, r)), dtype), stored(random.standard_normal((r, n)), dtype))
        for (m, r, n), dtype in zip(shapes, dtypes, strict=True)
    ]
    expected = [spectrum(*pair) for pair in pairs]
    for threads in (1, 3):
        found = spectra(iter(pairs), threads=threads)
        assert len(found) == len(pairs)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * other[0])


def test_spectra_takes_only_a_few_blocks_ahead():
    taken = []

    def pairs():
        for index in range(2000):
            taken.append(index)
            yield np.ones((3, 1)), np.ones((1, 3))
            if index == 1500:
                raise KeyError("the iterable's own error comes through")

    with pytest.raises(KeyError, match="own error"):
        spectra(pairs(), threads=1)
    assert len(taken) == 1501
    assert spectra([]) == []


def test_summary_of_known_values():
    norms = summarise(np.array([4.0, 2.0, 2.0, 1.0, 0.0]), scale=-0.5)
    share = np.array([16, 4, 4, 1]) / 25
    assert norms.frobenius == pytest.approx(2.5)
    assert norms.spectral == 2.0
    assert norms.stable_rank == pytest.approx(25 / 16)
    assert norms.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert norms.energy == pytest.approx({1: 16 / 25, 2: 20 / 25, 4: 1.0})


def test_ranks_of_equal_singular_values_are_their_count():
    norms = summarise(np.full(7, 1e200), 1.0)
    assert norms.stable_rank == pytest.approx(7)
    assert norms.effective_rank == pytest.approx(7)
    assert norms.frobenius == pytest.approx(7**0.5 * 1e200)


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"up \[3, 2\] and down \[4, 5\]"):
        spectrum(np.ones((3, 2)), np.ones((4, 5)))


def test_norms_never_import_torch():
    code = "import sys; import loratools.maths.norms; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
