"""Means by their Gram matrix equal what the same definitions give on the vectors themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from loratools.errors import NonFiniteError, OptionError
from loratools.maths import averages, means, spherical
from loratools.maths.lowrank import COMPUTE, Factors

SHARES = np.array([0.5, 0.2, 0.3])


def vectors(count=3, size=40, seed=0, towards=1.0):
    """Columns (size, count) of different lengths, with a common direction."""
    generator = np.random.default_rng(seed)
    columns = generator.standard_normal((size, count)) + towards * generator.standard_normal((size, 1))
    return columns * generator.uniform(0.3, 3.0, count)


def gram(columns):
    return columns.T @ columns


def unit(vector):
    return vector / np.linalg.norm(vector)


def angle(one, other):
    return 2 * math.atan2(
        float(np.linalg.norm(unit(one) - unit(other))), float(np.linalg.norm(unit(one) + unit(other)))
    )


def pair(degrees, lengths=(1.0, 1.0)):
    turned = math.radians(degrees)
    return np.array([[lengths[0], lengths[1] * math.cos(turned)], [0.0, lengths[1] * math.sin(turned)]])


@pytest.mark.parametrize("degrees", [0.01, 30.0, 90.0, 150.0, 179.9])
@pytest.mark.parametrize("t", [0.0001, 0.3, 0.5, 0.9])
def test_slerp_goes_a_share_of_the_angle_and_keeps_the_length(degrees, t):
    columns = pair(degrees)
    found = columns @ spherical.slerp(gram(columns), np.array([1 - t, t]))
    truth = np.array([math.cos(t * math.radians(degrees)), math.sin(t * math.radians(degrees))])
    assert found == pytest.approx(truth, abs=1e-8)


def test_slerp_of_different_lengths_interpolates_the_vectors_themselves():
    columns, t = pair(70.0, (2.0, 0.5)), 0.3
    theta = math.radians(70.0)
    truth = (columns @ [math.sin(0.7 * theta), math.sin(t * theta)]) / math.sin(theta)
    assert columns @ spherical.slerp(gram(columns), np.array([0.7, 0.3])) == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("rule", [spherical.nuslerp, spherical.multislerp, spherical.karcher])
@pytest.mark.parametrize("degrees", [0.01, 40.0, 90.0, 170.0])
def test_of_two_every_mean_divides_the_angle_and_the_lengths(rule, degrees):
    columns, t = pair(degrees, (2.0, 0.5)), 0.3
    found = columns @ rule(gram(columns), np.array([1 - t, t]))
    assert np.linalg.norm(found) == pytest.approx(0.7 * 2.0 + 0.3 * 0.5, rel=1e-9)
    assert angle(found, columns[:, 0]) == pytest.approx(t * math.radians(degrees), abs=1e-8)
    assert angle(found, columns[:, 1]) == pytest.approx((1 - t) * math.radians(degrees), abs=1e-8)


@pytest.mark.parametrize("rule", [spherical.slerp, spherical.nuslerp])
def test_without_a_great_circle_two_are_interpolated_linearly(rule):
    for columns in (pair(0.0, (2.0, 0.5)), pair(180.0, (2.0, 0.5)), pair(60.0, (2.0, 0.0))):
        assert rule(gram(columns), np.array([0.7, 0.3])) == pytest.approx([0.7, 0.3])
    with pytest.raises(OptionError, match=r"3 matrices.*Exactly two"):
        rule(gram(vectors()), SHARES)


def logarithm(at, point):
    along = float(at @ point)
    apart = point - along * at
    return angle(at, point) * unit(apart)


def exponential(at, vector):
    length = np.linalg.norm(vector)
    return math.cos(length) * at + math.sin(length) * vector / length


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("towards", [0.0, 1.0, 10.0])
def test_multislerp_is_one_step_on_the_sphere_from_the_mean_of_the_directions(seed, towards):
    columns = vectors(seed=seed, towards=towards)
    lengths = np.linalg.norm(columns, axis=0)
    units = columns / lengths
    start = unit(units @ SHARES)
    step = sum(share * logarithm(start, one) for share, one in zip(SHARES, units.T, strict=True))
    truth = (SHARES @ lengths) * exponential(start, step)
    found = columns @ spherical.multislerp(gram(columns), SHARES)
    assert found == pytest.approx(truth, abs=1e-9 * np.linalg.norm(truth))


@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize("towards", [0.3, 1.0, 10.0])
def test_karcher_is_where_the_logarithms_balance(count, towards):
    columns = vectors(count, seed=count, towards=towards)
    shares = means.shares(np.arange(1.0, count + 1.0).tolist())
    lengths = np.linalg.norm(columns, axis=0)
    found = columns @ spherical.karcher(gram(columns), shares)
    assert np.linalg.norm(found) == pytest.approx(shares @ lengths, rel=1e-10)
    pulls = sum(
        share * logarithm(unit(found), unit(one)) for share, one in zip(shares, columns.T, strict=True)
    )
    assert np.linalg.norm(pulls) < 1e-10


def test_karcher_has_less_squared_angle_than_points_around_it():
    columns = vectors(4, seed=8, towards=0.5)
    shares = np.full(4, 0.25)

    def loss(point):
        return sum(share * angle(point, one) ** 2 for share, one in zip(shares, columns.T, strict=True))

    found = unit(columns @ spherical.karcher(gram(columns), shares))
    generator = np.random.default_rng(1)
    for size in (1e-3, 1e-1):
        moved = [found + size * columns @ generator.standard_normal(4) for _ in range(20)]
        assert all(loss(point) > loss(found) for point in moved)


@pytest.mark.parametrize("rule", [spherical.multislerp, spherical.karcher])
def test_directions_that_balance_out_leave_the_weighted_mean(rule):
    columns = pair(180.0, (2.0, 0.5))
    assert columns @ rule(gram(columns), np.array([0.5, 0.5])) == pytest.approx([0.75, 0.0], abs=1e-12)
    star = np.array([[1.0, -0.5, -0.5], [0.0, 3**0.5 / 2, -(3**0.5) / 2]]) * [1.0, 2.0, 4.0]
    even = np.full(3, 1 / 3)
    assert star @ rule(gram(star), even) == pytest.approx(star @ even, abs=1e-12)


@pytest.mark.parametrize("rule", [spherical.multislerp, spherical.karcher])
def test_what_is_opposite_to_all_others_does_not_pull(rule):
    columns = pair(180.0, (2.0, 0.5))
    found = columns @ rule(gram(columns), np.array([0.7, 0.3]))
    assert found == pytest.approx([0.7 * 2.0 + 0.3 * 0.5, 0.0], abs=1e-12)


@pytest.mark.parametrize("rule", [spherical.multislerp, spherical.karcher])
def test_zero_has_no_direction_and_shortens_the_mean(rule):
    columns = vectors()
    without = rule(gram(columns[:, :2]), SHARES[:2] / SHARES[:2].sum())
    columns[:, 2] = 0.0
    found = columns @ rule(gram(columns), SHARES)
    assert found == pytest.approx(SHARES[:2].sum() * columns[:, :2] @ without, abs=1e-10)
    assert not (np.zeros((4, 3)) @ rule(np.zeros((3, 3)), SHARES)).any()


def distances(columns, shares, point):
    return float(shares @ np.linalg.norm(columns - point[:, None], axis=0))


@pytest.mark.parametrize("count", [3, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_the_median_has_the_least_sum_of_distances(count, seed):
    columns = vectors(count, 6, seed, 0.3)
    shares = means.shares(np.random.default_rng(seed).uniform(0.5, 1.5, count).tolist())
    found = columns @ means.geometric_median(gram(columns), shares)
    best = minimize(lambda x: distances(columns, shares, x), columns @ shares, tol=1e-13)
    assert distances(columns, shares, found) <= best.fun * (1 + 1e-10)


def test_a_matrix_of_more_than_half_of_all_weight_is_the_median_and_so_is_one_in_the_middle():
    columns = vectors(3)
    assert means.geometric_median(gram(columns), np.array([0.2, 0.55, 0.25])) == pytest.approx([0, 1, 0])
    line = np.array([[1.0, 2.0, 30.0]])
    assert line @ means.geometric_median(gram(line), np.full(3, 1 / 3)) == pytest.approx([2.0])
    twice = vectors(4)
    twice[:, 1] = twice[:, 0]
    even = np.full(4, 0.25)
    assert twice @ means.geometric_median(gram(twice), even) == pytest.approx(twice[:, 0], abs=1e-6)


def test_the_median_leaves_a_matrix_that_it_begins_at():
    # The mean of the five is the last, but the three on the right hold it more weakly than they pull.
    columns = np.array([[3.0, 1.0, 1.0, -5.0, 0.0], [0.0, 1.0, -1.0, 0.0, 0.0]])
    shares = np.full(5, 0.2)
    assert columns @ shares == pytest.approx([0.0, 0.0])
    found = columns @ means.geometric_median(gram(columns), shares)
    best = minimize(lambda x: distances(columns, shares, x), [0.5, 0.1], method="Nelder-Mead", tol=1e-12)
    assert best.fun < distances(columns, shares, np.zeros(2)) - 1e-3
    assert distances(columns, shares, found) <= best.fun * (1 + 1e-9)


def test_an_outlier_moves_the_median_little_however_far_it_is():
    near = vectors(4, 10, 3, 5.0)
    found = []
    for far in (1e2, 1e4):
        columns = np.column_stack([near, far * np.eye(10)[0]])
        found.append(columns @ means.geometric_median(gram(columns), np.full(5, 0.2)))
    assert np.linalg.norm(found[0] - found[1]) < 0.1 * np.linalg.norm(near, axis=0).max()


def test_of_two_even_ones_the_median_is_their_mean():
    columns = vectors(2)
    assert means.geometric_median(gram(columns), np.array([0.5, 0.5])) == pytest.approx([0.5, 0.5])
    assert means.geometric_median(np.zeros((2, 2)), np.array([0.5, 0.5])) == pytest.approx([0.5, 0.5])


def test_the_median_of_what_can_hardly_be_told_apart_is_among_it():
    # Further from each other than what counts as one, and all of them nearer than that to their mean.
    near = 1.2 * means.ALIKE / 2**0.5 * np.eye(3)
    columns = np.vstack([np.ones(3), near])
    found = columns @ means.geometric_median(gram(columns), np.full(3, 1 / 3))
    assert found == pytest.approx(columns.mean(axis=1), abs=1e-9)


@pytest.mark.parametrize("count", [2, 4])
def test_model_stock_is_the_nearest_point_to_the_centre_that_it_supposes(count):
    # Deviations from the centre of one length, orthogonal to each other and to the way from the base, which is 0.
    centre = np.concatenate([[2.0], np.zeros(count)])
    columns = centre[:, None] + np.vstack([np.zeros(count), 1.5 * np.eye(count)])
    mean = columns.mean(axis=1)
    nearest = (centre @ mean) / (mean @ mean) * mean
    assert columns @ means.model_stock(gram(columns)) == pytest.approx(nearest)


def test_model_stock_follows_the_mean_cosine():
    columns = vectors(5, seed=4)
    units = columns / np.linalg.norm(columns, axis=0)
    pairs = [float(units[:, i] @ units[:, j]) for i in range(5) for j in range(i)]
    cosine = sum(pairs) / len(pairs)
    assert cosine > 0.1
    found = means.model_stock(gram(columns))
    assert found == pytest.approx(np.full(5, 5 * cosine / (1 + 4 * cosine) / 5))
    assert not means.model_stock(gram(pair(120.0))).any()
    assert means.model_stock(gram(pair(0.0))) == pytest.approx([0.5, 0.5])
    assert means.model_stock(np.array([[3.0]])) == pytest.approx([1.0])


def test_orthogonal_addition_is_the_sum_of_the_residuals():
    columns = vectors(5, seed=6, towards=3.0)
    residuals = [columns[:, 0]]
    for place in range(1, 5):
        basis = np.linalg.qr(columns[:, :place]).Q
        residuals.append(columns[:, place] - basis @ (basis.T @ columns[:, place]))
    found = columns @ means.orthogonal_addition(gram(columns))
    truth = sum(residuals)
    assert found == pytest.approx(truth, abs=1e-8 * np.linalg.norm(truth))


def test_what_lies_in_the_span_of_earlier_ones_adds_nothing():
    columns = vectors(4, seed=2)
    columns[:, 2] = columns[:, 0] - 2 * columns[:, 1]
    expected = columns @ (means.orthogonal_addition(gram(columns[:, [0, 1, 3]])) @ np.eye(4)[[0, 1, 3]])
    found = columns @ means.orthogonal_addition(gram(columns))
    assert found == pytest.approx(expected, abs=1e-7)
    opposite = pair(180.0, (1.0, 3.0))
    assert means.orthogonal_addition(gram(opposite)) == pytest.approx([1.0, 0.0])
    assert not means.orthogonal_addition(np.zeros((3, 3))).any()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_moving_average_is_its_recurrence(beta, count):
    values = np.random.default_rng(count).standard_normal(count)
    mean = values[0]
    for value in values[1:]:
        mean = beta * mean + (1 - beta) * value
    found = averages.moving_average(count, beta)
    assert found @ values == pytest.approx(mean, abs=1e-12)
    assert found.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("width", [0.05, 0.15, 0.28, averages.WIDEST])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_power_average_is_its_recurrence(width, count):
    values = np.random.default_rng(count).standard_normal(count)
    power, mean = averages.exponent_of(width) + 1, 0.0
    for number, value in enumerate(values, start=1):
        beta = (1 - 1 / number) ** power
        mean = beta * mean + (1 - beta) * value
    found = averages.power_average(count, width)
    assert found @ values == pytest.approx(mean, abs=1e-12)
    assert found.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25, averages.WIDEST])
def test_the_width_is_the_standard_deviation_of_the_profile(width):
    gamma = averages.exponent_of(width)
    # Of the density (γ + 1)·t^γ on [0, 1]: moments (γ + 1)/(γ + 1 + n).
    first, second = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(second - first**2) == pytest.approx(width, rel=1e-6)
    shares = averages.power_average(2000, width)
    at = (np.arange(2000) + 0.5) / 2000
    assert math.sqrt(shares @ at**2 - (shares @ at) ** 2) == pytest.approx(width, rel=1e-2)


def test_the_widest_power_average_is_the_plain_mean():
    assert averages.power_average(5, averages.WIDEST) == pytest.approx(np.full(5, 0.2))


@pytest.mark.parametrize("width", [0.0, -0.1, 0.29, math.nan])
def test_a_width_out_of_range_is_refused(width):
    with pytest.raises(OptionError, match=r"width.*\(0, 1/√12\]"):
        averages.exponent_of(width)


def factors(rank, seed, shape=(9, 7)):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator, dtype=COMPUTE)
    return Factors(up, torch.randn(rank, shape[1], generator=generator, dtype=COMPUTE))


def test_shares_are_relative_and_of_any_size():
    assert means.shares([1.0, -3.0]) == pytest.approx([0.25, 0.75])
    assert means.shares([1e308, 1e308]) == pytest.approx([0.5, 0.5])
    assert means.shares([5e-324]) == pytest.approx([1.0])


@pytest.mark.parametrize("size", [1e-140, 1.0, 1e140])
def test_gram_matrices_keep_ratios_whatever_the_size(size):
    parts = [factors(2, 0), factors(3, 1)]
    deltas = [parts[0].delta(), -2.0 * parts[1].delta()]
    truth = [[float((one * other).sum()) for one in deltas] for other in deltas]
    found = means.gram_of(parts, [size, -2.0 * size])
    assert found / found[0, 0] == pytest.approx(np.array(truth) / truth[0][0], rel=1e-12)


def test_gram_matrices_of_nothing_and_of_nan():
    zero = Factors(torch.zeros(9, 1, dtype=COMPUTE), torch.zeros(1, 7, dtype=COMPUTE))
    assert not means.gram_of([zero, zero], [1.0, 1.0]).any()
    with pytest.raises(NonFiniteError):
        means.gram_of([zero, factors(1, 0)], [1.0, math.inf])


def test_a_weighted_sum_reports_what_it_keeps():
    parts = [factors(2, 0), factors(3, 1)]
    whole = means.weighted_sum(parts, [0.5, -1.5])
    truth = 0.5 * parts[0].delta() - 1.5 * parts[1].delta()
    assert float((whole.factors.delta() - truth).norm()) <= 1e-12 * float(truth.norm())
    assert whole.energy == 1.0
    assert whole.square == pytest.approx(float(truth.square().sum()), rel=1e-12)
    cut = means.weighted_sum(parts, [0.5, -1.5], 2)
    sigma = torch.linalg.svdvals(truth)
    assert cut.energy == pytest.approx(float(sigma[:2].square().sum() / sigma.square().sum()), rel=1e-12)
    assert cut.square == pytest.approx(float(sigma[:2].square().sum()), rel=1e-12)
    alone = means.weighted_sum(parts[:1], [1.0])
    assert alone == (parts[0], 1.0, None)
