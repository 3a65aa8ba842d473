"""Methods whose result is a weighted sum equal their definitions on dense matrices, and keep their laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from loratools.errors import NonFiniteError, OptionError
from loratools.maths.lowrank import COMPUTE, Factors
from loratools.methods import Options, Part, get, options

few = settings(max_examples=12, deadline=None, derandomize=True)
SPHERE = ["karcher", "multislerp", "nuslerp", "slerp"]
RELATIVE = [*SPHERE, "geometric-median"]
NAMES = [*RELATIVE, "ema", "model-stock", "orthogonal-add", "svd"]
# Linear, a 3x3 convolution flattened to (out, in·9), and ranks that exceed what fits.
SHAPES = [(14, 11), (6, 36), (6, 5)]
WEIGHTS = [1.0, -0.5, 2.0]
TOLERANCE = 1e-7


def factors(shape, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator, dtype=COMPUTE)
    return Factors(up, torch.randn(rank, shape[1], generator=generator, dtype=COMPUTE))


def parts_of(shape, ranks, weights=WEIGHTS, seed=0):
    """Adapters of several ranks that have something in common, with a scale of their own beside the weight."""
    common = factors(shape, 1, 1000 + seed)
    parts = []
    for place, (rank, weight) in enumerate(zip(ranks, weights, strict=False)):
        own, sign = factors(shape, rank, seed + place), math.copysign(2.0, weight)
        both = Factors(torch.cat([own.up, sign * common.up], dim=1), torch.cat([own.down, common.down]))
        parts.append(Part(both, weight, 0.5 + place, place))
    return parts


def parts_for(name, shape, ranks=(2, 3, 1), weights=WEIGHTS, seed=0):
    return parts_of(shape, ranks, weights, seed)[: get(name).most]


def delta(name, parts, **chosen):
    return get(name).combine(parts, Options(**chosen)).factors.delta()


def assert_same(found, truth, size=None):
    size = float(truth.norm()) if size is None else size
    assert float((found - truth).norm()) <= TOLERANCE * size


def turned(parts):
    """The changes, turned round where the weight is negative, and their shares."""
    total = sum(abs(part.weight) for part in parts)
    changes = [math.copysign(1.0, part.weight) * part.scale * part.factors.delta() for part in parts]
    return changes, [abs(part.weight) / total for part in parts]


def weighted(parts):
    return [part.weight * part.scale * part.factors.delta() for part in parts]


def angle(one, other):
    one, other = one / one.norm(), other / other.norm()
    return 2 * math.atan2(float((one - other).norm()), float((one + other).norm()))


def slerp(parts, _options):
    (one, other), (_, t) = turned(parts)
    theta = angle(one, other)
    return (math.sin((1 - t) * theta) * one + math.sin(t * theta) * other) / math.sin(theta)


def nuslerp(parts, _options):
    (one, other), (rest, t) = turned(parts)
    theta = angle(one, other)
    direction = math.sin(rest * theta) * one / one.norm() + math.sin(t * theta) * other / other.norm()
    return (rest * one.norm() + t * other.norm()) * direction / math.sin(theta)


def on_sphere(parts, steps):
    changes, shares = turned(parts)
    units = [change / change.norm() for change in changes]
    length = sum(share * change.norm() for share, change in zip(shares, changes, strict=True))
    point = sum(share * one for share, one in zip(shares, units, strict=True))
    point = point / point.norm()
    for _ in range(steps):
        tangent = torch.zeros_like(point)
        for share, one in zip(shares, units, strict=True):
            apart = one - (one * point).sum() * point
            if len(units) > 1:
                tangent += share * angle(one, point) * apart / apart.norm()
        size = float(tangent.norm())
        if size > 1e-14:
            point = math.cos(size) * point + math.sin(size) * tangent / size
    return length * point


def geometric_median(parts, _options):
    """By a general minimiser on coefficients, from the weighted mean."""
    changes, shares = turned(parts)
    stacked = torch.stack([change.flatten() for change in changes]).numpy()

    def loss(coefficients):
        return sum(
            share * ((coefficients @ stacked - one) ** 2).sum() ** 0.5
            for share, one in zip(shares, stacked, strict=True)
        )

    best = minimize(
        loss, shares, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000}
    )
    return torch.from_numpy(best.x @ stacked).view(changes[0].shape)


def model_stock(parts, _options):
    taus = weighted(parts)
    count = len(taus)
    cosines = [math.cos(angle(one, other)) for one, other in itertools.combinations(taus, 2)]
    cosine = max(0.0, sum(cosines) / len(cosines))
    return count * cosine / (1 + (count - 1) * cosine) * sum(taus) / count


def orthogonal_add(parts, _options):
    flat = torch.stack([tau.flatten() for tau in weighted(parts)], dim=1)
    total = flat[:, 0]
    for place in range(1, flat.shape[1]):
        basis = torch.linalg.qr(flat[:, :place]).Q
        total = total + flat[:, place] - basis @ (basis.T @ flat[:, place])
    return total.view(parts[0].factors.shape)


def ema(parts, chosen):
    mean, gamma = None, None
    if chosen.width:
        # By bisection of σ_rel, which falls as γ grows.
        low, high = 0.0, 1e4
        for _ in range(200):
            gamma = (low + high) / 2
            wide = math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)) > chosen.width
            low, high = (gamma, high) if wide else (low, gamma)
    for number, tau in enumerate(weighted(parts), start=1):
        beta = chosen.beta if gamma is None else (1 - 1 / number) ** (gamma + 1)
        mean = tau if mean is None else beta * mean + (1 - beta) * tau
    return mean


REFERENCES = {
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": lambda parts, _options: on_sphere(parts, 1),
    "karcher": lambda parts, _options: on_sphere(parts, 300),
    "geometric-median": geometric_median,
    "model-stock": model_stock,
    "orthogonal-add": orthogonal_add,
    "ema": ema,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(set(REFERENCES) - {"geometric-median"}))
def test_it_is_its_definition_on_dense_matrices(name, shape):
    parts = parts_for(name, shape)
    truth = REFERENCES[name](parts, Options())
    assert float(truth.norm()) > 0.1
    outcome = get(name).combine(parts)
    assert_same(outcome.factors.delta(), truth)
    assert outcome.energy == 1.0
    assert outcome.square == pytest.approx(float(truth.square().sum()), rel=1e-6)
    assert outcome.factors.rank <= min(*shape, sum(part.factors.rank for part in parts))


@few
@given(
    ranks=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    weights=st.lists(st.sampled_from([-2.0, -0.3, 0.4, 1.0, 1.7]), min_size=4, max_size=4),
    shape=st.sampled_from([(8, 13), (13, 8), (5, 18)]),
    name=st.sampled_from(sorted(set(REFERENCES) - {"geometric-median", "karcher"})),
    seed=st.integers(0, 99),
)
def test_it_is_its_definition_whatever_the_ranks_and_weights(ranks, weights, shape, name, seed):
    parts = parts_for(name, shape, ranks, weights, seed)
    truth = REFERENCES[name](parts, Options())
    assert_same(delta(name, parts), truth, sum(float(tau.norm()) for tau in weighted(parts)))


def test_the_median_is_that_of_a_general_minimiser():
    parts = parts_of((9, 7), (2, 3, 1), [1.0, -1.1, 0.9])
    found, truth = delta("geometric-median", parts), geometric_median(parts, Options())
    # The minimiser compares sums of distances, which are flat at the median.
    assert float((found - truth).norm()) <= 1e-6 * float(truth.norm())
    changes, shares = turned(parts)
    mean = sum(share * change for share, change in zip(shares, changes, strict=True))
    assert float((found - mean).norm()) > 1e-2 * float(mean.norm())


@pytest.mark.parametrize(("beta", "width"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.05), (0.95, 0.2)])
def test_ema_follows_the_order_of_the_inputs(beta, width):
    parts = parts_of((9, 7), (2, 3, 1))
    truth = ema(parts, Options(beta=beta, width=width))
    for shuffled in itertools.permutations(parts):
        assert_same(delta("ema", shuffled, beta=beta, width=width), truth)
    reversed_ = [Part(part.factors, part.weight, part.scale, 9 - place) for place, part in enumerate(parts)]
    assert float((delta("ema", reversed_, beta=beta, width=width) - truth).norm()) > 0.1


def test_orthogonal_add_keeps_the_first_and_follows_the_order_of_the_inputs():
    parts = parts_of((9, 7), (2, 3, 1))
    first = weighted(parts)[0]
    found = delta("orthogonal-add", parts)
    assert float((found * first).sum()) == pytest.approx(float(first.square().sum()), rel=1e-9)
    assert_same(delta("orthogonal-add", parts[::-1]), found)
    other = [Part(part.factors, part.weight, part.scale, 9 - place) for place, part in enumerate(parts)]
    assert float((delta("orthogonal-add", other) - found).norm()) > 0.1


def test_svd_is_the_nearest_matrix_of_the_largest_rank():
    parts = parts_of((14, 11), (2, 3, 1))
    total = sum(weighted(parts))
    u, sigma, vh = torch.linalg.svd(total)
    for rank, chosen in ((4, {}), (2, {"rank": 2}), (7, {"rank": 50})):
        outcome = get("svd").combine(parts, Options(**chosen))
        truth = u[:, :rank] @ torch.diag(sigma[:rank]) @ vh[:rank]
        assert_same(outcome.factors.delta(), truth)
        assert outcome.factors.rank == rank
        energy = float(sigma[:rank].square().sum() / sigma.square().sum())
        assert outcome.energy == pytest.approx(energy, rel=1e-12)


def test_svd_of_one_adapter_has_its_rank():
    part = Part(factors((14, 11), 5, 0), -0.5)
    outcome = get("svd").combine([part])
    assert outcome.factors.rank == 5
    assert_same(outcome.factors.delta(), -0.5 * part.factors.delta())
    assert get("svd").combine([part], Options(rank=2)).factors.rank == 2


@pytest.mark.parametrize("name", NAMES)
def test_one_adapter_at_weight_one_is_itself_bit_for_bit(name):
    part = Factors(*(each.half() for each in (factors((9, 7), 3, 0).up, factors((9, 7), 3, 0).down)))
    found = get(name).combine([Part(part)]).factors
    assert found.up is part.up
    assert found.down is part.down


@pytest.mark.parametrize("name", NAMES)
def test_one_adapter_with_a_weight_or_a_scale(name):
    part = factors((9, 7), 3, 0)
    expected = -3.0 if name in RELATIVE else -1.5
    assert_same(delta(name, [Part(part, -0.5, 3.0)]), expected * part.delta())


@pytest.mark.parametrize("name", [name for name in NAMES if "order-free" in get(name).laws])
def test_order_does_not_matter(name):
    parts = parts_for(name, (9, 7))
    truth = delta(name, parts)
    for shuffled in itertools.permutations(parts):
        again = [Part(part.factors, part.weight, part.scale, at) for at, part in enumerate(shuffled)]
        assert_same(delta(name, again), truth)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_relative_or_multiply(name):
    parts = parts_for(name, (9, 7))
    truth = delta(name, parts)
    assert ("homogeneous" in get(name).laws) == (name not in RELATIVE)
    for scale in (0.25, -3.0):
        scaled = [Part(part.factors, part.weight * scale, part.scale, part.source) for part in parts]
        by = math.copysign(1.0, scale) if name in RELATIVE else abs(scale) * math.copysign(1.0, scale)
        assert_same(delta(name, scaled), by * truth)


@pytest.mark.parametrize("name", RELATIVE)
def test_lambda_multiplies_the_mean(name):
    parts = parts_for(name, (9, 7))
    assert_same(delta(name, parts, lam=-0.7), -0.7 * delta(name, parts))


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_truncates_the_whole_result(name):
    parts = parts_for(name, (14, 11))
    whole = delta(name, parts, rank=11)
    u, sigma, vh = torch.linalg.svd(whole, full_matrices=False)
    outcome = get(name).combine(parts, Options(rank=2))
    assert_same(outcome.factors.delta(), u[:, :2] @ torch.diag(sigma[:2]) @ vh[:2])
    assert outcome.factors.rank == 2
    assert outcome.energy == pytest.approx(float(sigma[:2].square().sum() / sigma.square().sum()), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_one_adapter_twice(name):
    part = factors((9, 7), 3, 0)
    found = delta(name, [Part(part, 1.0, 2.0, 0), Part(part, 1.0, 2.0, 1)])
    expected = 2.0 if name == "svd" else 1.0
    assert_same(found, expected * 2.0 * part.delta())


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_and_its_negative(name):
    part = factors((9, 7), 3, 0)
    found = delta(name, [Part(part, 1.0, 1.0, 0), Part(part, -1.0, 1.0, 1)])
    # Of a sequence the first stays: what repeats it adds nothing; and the last checkpoint has a share of its own.
    expected = {"orthogonal-add": 1.0, "ema": 0.95 - 0.05}.get(name, 0.0)
    assert_same(found, expected * part.delta(), size=float(part.delta().norm()))


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_zero_is_no_trouble(name):
    zero = Factors(torch.zeros(9, 2, dtype=COMPUTE), torch.zeros(2, 7, dtype=COMPUTE))
    part = factors((9, 7), 3, 0)
    found = delta(name, [Part(part, 3.0, 1.0, 0), Part(zero, 1.0, 1.0, 1)])
    expected = {
        "svd": 3.0,
        "orthogonal-add": 3.0,
        "ema": 3.0 * 0.95,
        "model-stock": 0.0,
        "geometric-median": 1.0,
    }.get(name, 0.75)
    assert_same(found, expected * part.delta(), size=float(part.delta().norm()))
    assert not delta(name, [Part(zero, 1.0, 1.0, 0), Part(zero, 1.0, 1.0, 1)]).any()


@pytest.mark.parametrize("size", [1e-120, 1e120])
@pytest.mark.parametrize("name", NAMES)
def test_huge_and_tiny_scales(name, size):
    parts = parts_for(name, (9, 7))
    scaled = [Part(part.factors, part.weight, part.scale * size, part.source) for part in parts]
    found = delta(name, scaled)
    assert bool(found.isfinite().all())
    assert_same(found / size, delta(name, parts))


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_refused(name):
    broken = factors((9, 7), 2, 0)
    broken.up[2, 1] = math.nan
    with pytest.raises(NonFiniteError):
        delta(name, [Part(broken), Part(factors((9, 7), 3, 1))])


@pytest.mark.parametrize("name", ["slerp", "nuslerp"])
def test_two_adapters_at_most(name):
    assert get(name).most == 2
    with pytest.raises(OptionError, match=r"3 matrices.*two.*karcher"):
        get(name).combine(parts_of((9, 7), (2, 3, 1)))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"beta": 1.0}, r"beta is 1.0.*\[0, 1\)"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"width": 0.3}, r"width is 0.3.*0.2886"),
        ({"width": math.nan}, "width is nan"),
    ],
)
def test_options_out_of_range_are_refused(chosen, message):
    with pytest.raises(OptionError, match=message):
        options(get("ema"), **chosen)


def test_model_stock_of_what_disagrees_is_the_base():
    one = factors((9, 7), 2, 0)
    against = Factors(torch.cat([-one.up, factors((9, 7), 2, 5).up], dim=1), torch.cat([one.down, one.down]))
    assert not delta("model-stock", [Part(one), Part(against)]).any()
