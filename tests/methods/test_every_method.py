"""What every merge method owes its user, by its declared laws: on mixed ranks, any options, and degenerate adapters.

Methods of ΔW all declare laws. Those that declare none repeat another tool's arithmetic on factors of one rank, in
float32: of them nothing is asked here but what holds of any function.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.maths.lowrank import COMPUTE, Factors
from loratools.methods import Options, Part, get, methods

# The matrices here are so small that handing them to several threads takes longer than multiplying them.
torch.set_num_threads(1)

few = settings(max_examples=4, deadline=None, derandomize=True)
NAMES = sorted(methods())
ON_DELTA = [name for name in NAMES if get(name).laws]
SHAPES = [(9, 7), (6, 36), (20, 5)]
TOLERANCE = 1e-9
ANY_OPTIONS = {
    "density": st.sampled_from([0.15, 0.5, 0.9, 1.0]),
    "lam": st.sampled_from([1.0, 0.3, -2.0]),
    "seed": st.integers(0, 5),
    "epsilon": st.sampled_from([0.0, 0.1, 0.6]),
    "gamma": st.sampled_from([0.0, 0.01, 0.2]),
    "majority": st.sampled_from(["total", "frequency"]),
    "common": st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    "part_rank": st.sampled_from([None, 1, 2]),
    "beta": st.sampled_from([0.0, 0.5, 0.95]),
    "width": st.sampled_from([0.0, 0.1, 0.2]),
}


def having(law):
    """The methods that declare a law."""
    return [name for name in NAMES if law in get(name).laws]


def most(name, count=4):
    """How many adapters a test may give to a method."""
    return min(count, get(name).most or count)


def factors(shape, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator, dtype=COMPUTE)
    return Factors(up, torch.randn(rank, shape[1], generator=generator, dtype=COMPUTE))


@st.composite
def adapters(draw, name, least=1):
    """Adapters of one shape, of several ranks unless the method wants one, with weights of both signs and scales."""
    shape = draw(st.sampled_from(SHAPES))
    count = draw(st.integers(least, most(name)))
    rank = st.integers(1, 5) if name in ON_DELTA else st.just(draw(st.integers(1, 5)))
    seed = draw(st.integers(0, 99))
    weight = st.sampled_from([1.0, 0.5, -0.7, 2.0, -1.0, 0.3])
    scale = st.sampled_from([1.0, 0.25, 2.0])
    return [
        Part(factors(shape, draw(rank), 100 * seed + place), draw(weight), draw(scale), place)
        for place in range(count)
    ]


def chosen(data, name):
    """Any of the method's options."""
    return {
        field: data.draw(ANY_OPTIONS[field], label=field)
        for field in sorted(taken(name) & ANY_OPTIONS.keys())
    }


def taken(name):
    """The fields of the options that a method reads."""
    return {option.field for option in get(name).options}


def without_chance(name):
    """Options with which a method drops nothing at random."""
    return {"density": 1.0} if {"seed", "density"} <= taken(name) else {}


def delta(name, parts, **options):
    """The whole ΔW that a method defines: nothing is truncated."""
    return whole(name, parts, **options).factors.to(COMPUTE).delta()


def whole(name, parts, **options):
    """What a method returns where it truncates nothing."""
    method = get(name)
    needs = not method.lossless and "rank" in taken(name)
    rank = min(parts[0].factors.shape) if needs else None
    return method.combine(parts, Options(rank=rank, key="layer", **options))


def changed(part, **fields):
    """A part with other fields."""
    kept = {field: getattr(part, field) for field in ("factors", "weight", "scale", "source")}
    return Part(**{**kept, **fields})


def tau(part):
    return part.multiplier * part.factors.delta()


def assert_same(found, truth, parts):
    size = float(truth.norm()) + sum(float(tau(part).norm()) for part in parts)
    assert torch.isfinite(found).all()
    assert float((found - truth).norm()) <= TOLERANCE * size


@pytest.mark.parametrize("name", having("identity"))
@few
@given(data=st.data())
def test_one_adapter_at_weight_one_is_itself(name, data):
    part = changed(data.draw(adapters(name))[0], weight=1.0)
    assert_same(delta(name, [part]), tau(part), [part])


@pytest.mark.parametrize("name", having("order-free"))
@few
@given(data=st.data())
def test_order_does_not_matter_whatever_the_options(name, data):
    parts, options = data.draw(adapters(name, least=2)), chosen(data, name)
    other = data.draw(st.permutations(parts))
    assert_same(delta(name, other, **options), delta(name, parts, **options), parts)


@pytest.mark.parametrize("name", having("linear"))
@few
@given(data=st.data())
def test_a_linear_method_is_the_weighted_sum_of_what_it_makes_of_each(name, data):
    parts, options = data.draw(adapters(name)), chosen(data, name)
    single = [part.weight * delta(name, [changed(part, weight=1.0)], **options) for part in parts]
    assert_same(delta(name, parts, **options), sum(single), parts)


@pytest.mark.parametrize("name", having("homogeneous"))
@few
@given(data=st.data())
def test_all_weights_multiplied_multiply_the_result(name, data):
    parts, options = data.draw(adapters(name)), chosen(data, name)
    factor = data.draw(st.sampled_from([1e-3, 0.37, 12.0]))
    scaled = [changed(part, weight=factor * part.weight) for part in parts]
    assert_same(delta(name, scaled, **options), factor * delta(name, parts, **options), scaled)


@pytest.mark.parametrize("name", having("sum"))
@few
@given(data=st.data())
def test_a_method_without_losses_is_the_sum(name, data):
    parts = data.draw(adapters(name))
    options = {**chosen(data, name), "density": 1.0, "lam": 1.0}
    assert_same(delta(name, parts, **options), sum(tau(part) for part in parts), parts)


@pytest.mark.parametrize("name", NAMES)
@few
@given(data=st.data())
def test_a_weight_of_zero_is_absence_to_the_last_bit(name, data):
    parts, options = data.draw(adapters(name)), chosen(data, name)
    absent = Part(factors(parts[0].factors.shape, parts[0].factors.rank, 7), 0.0, 1.0, len(parts))
    place = data.draw(st.integers(0, len(parts)))
    with_absent = [*parts[:place], absent, *parts[place:]]
    assert torch.equal(delta(name, with_absent, **options), delta(name, parts, **options))


@pytest.mark.parametrize("name", ON_DELTA)
@few
@given(data=st.data())
def test_what_counts_is_the_change_not_its_factors(name, data):
    """Other factors of the same ΔW, of higher rank and with the scale in them, give the same result."""
    parts, options = data.draw(adapters(name)), chosen(data, name)
    generator = torch.Generator().manual_seed(5)
    others = []
    for part in parts:
        up, down = part.factors.up, part.factors.down
        turn = torch.randn(part.factors.rank, part.factors.rank, generator=generator, dtype=COMPUTE)
        turn = turn + 4 * torch.eye(part.factors.rank, dtype=COMPUTE)
        up, down = part.scale * up @ turn, torch.linalg.solve(turn, down)
        padded = Factors(torch.cat([up, up], dim=1), torch.cat([0.25 * down, 0.75 * down]))
        others.append(changed(part, factors=padded, scale=1.0))
    size = sum(float(tau(part).norm()) for part in parts)
    found, truth = delta(name, others, **options), delta(name, parts, **options)
    assert float((found - truth).norm()) <= 1e-8 * (size + float(truth.norm()))


@pytest.mark.parametrize("exponent", [-100, 100])
@pytest.mark.parametrize("name", ON_DELTA)
def test_the_unit_of_the_scale_does_not_matter(name, exponent):
    """Changes of 1e-30 and of 1e30 are merged as those of 1 are."""
    parts = [
        Part(factors((9, 7), 3, place), weight, 0.5, place) for place, weight in enumerate([1.0, -0.5, 2.0])
    ][: most(name)]
    scaled = [changed(part, scale=part.scale * 2.0**exponent) for part in parts]
    found = delta(name, scaled) * 2.0**-exponent
    assert_same(found, delta(name, parts), parts)


@pytest.mark.parametrize("name", NAMES)
def test_a_huge_and_a_tiny_adapter_give_something_finite(name):
    parts = [Part(factors((9, 7), 3, 1), 1.0, 1e15, 0), Part(factors((9, 7), 3, 2), 1.0, 1e-15, 1)]
    assert torch.isfinite(delta(name, parts)).all()


@pytest.mark.parametrize("name", ON_DELTA)
def test_half_precision_at_its_limits_is_finite(name):
    wide = Factors(
        torch.full((9, 2), 65504.0, dtype=torch.float16), torch.full((2, 7), 65504.0, dtype=torch.float16)
    )
    small = Factors(torch.full((9, 2), 6e-8, dtype=torch.float16), torch.eye(7, dtype=torch.float16)[:2])
    found = delta(name, [Part(wide, 1.0, 1.0, 0), Part(small, 1.0, 1.0, 1)], **without_chance(name))
    assert torch.isfinite(found).all()
    assert float(found.norm()) > 0.0


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_module_of_zeros_merges_to_zero(name, count):
    zero = Factors(torch.zeros(9, 3, dtype=COMPUTE), factors((9, 7), 3, 1).down)
    assert not delta(name, [Part(zero, 1.0, 1.0, place) for place in range(count)]).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_module_of_zeros_beside_another_is_finite(name):
    zero = Factors(torch.zeros(9, 3, dtype=COMPUTE), torch.zeros(3, 7, dtype=COMPUTE))
    parts = [Part(factors((9, 7), 3, 1), 1.0, 1.0, 0), Part(zero, 1.0, 1.0, 1)]
    for each in (parts, parts[::-1]):
        assert torch.isfinite(delta(name, each)).all()


@pytest.mark.parametrize("name", [name for name in having("identity") if name not in having("homogeneous")])
def test_the_mean_of_identical_adapters_is_that_adapter(name):
    part = Part(factors((9, 7), 3, 1), 0.4)
    copies = [changed(part, source=place) for place in range(most(name))]
    truth = part.factors.delta()
    assert float((delta(name, copies) - truth).norm()) <= 1e-7 * float(truth.norm())


@pytest.mark.parametrize("name", ON_DELTA)
def test_identical_adapters_bring_nothing_that_one_has_not(name):
    """Of equal changes no method makes an element where they have none, or a direction that they lack."""
    part = Part(factors((9, 7), 2, 1), 1.0)
    copies = [changed(part, source=place) for place in range(most(name, 3))]
    found = delta(name, copies)
    assert torch.isfinite(found).all()
    if get(name).lossless:
        inside = part.factors.up @ torch.linalg.lstsq(part.factors.up, found).solution
        assert float((found - inside).norm()) <= 1e-9 * float(found.norm() + 1.0)
    else:
        aligned = found * part.factors.delta()
        assert float(aligned.min()) >= -1e-9


@pytest.mark.parametrize("name", having("order-free"))
def test_opposite_adapters_cancel_whatever_their_factors(name):
    one = factors((9, 7), 3, 1)
    by = torch.tensor([2.0, -0.5, 3.0], dtype=COMPUTE)
    turned = Factors(one.up * by, one.down / by[:, None])
    parts = [Part(one, 1.0, 1.0, 0), Part(turned, -1.0, 1.0, 1)]
    found = delta(name, parts, **without_chance(name))
    assert float(found.norm()) <= 1e-9 * float(one.delta().norm())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_bits(name):
    parts = [Part(factors((9, 7), 3, place), 0.5 + place, 1.0, place) for place in range(2)]
    assert torch.equal(delta(name, parts), delta(name, parts))


@pytest.mark.parametrize("name", NAMES)
def test_the_energy_is_a_fraction_and_one_where_nothing_is_lost(name):
    parts = [Part(factors((9, 7), 3, place), 0.5 + place, 1.0, place) for place in range(2)]
    outcome = whole(name, parts)
    assert outcome.energy is None or math.isclose(outcome.energy, 1.0, abs_tol=1e-9)
    if outcome.square is not None:
        square = float(outcome.factors.to(COMPUTE).delta().square().sum())
        assert outcome.square == pytest.approx(square, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if "rank" in taken(name)])
def test_a_rank_is_kept_to_and_the_energy_says_what_it_costs(name):
    parts = [Part(factors((9, 7), 3, place), 0.5 + place, 1.0, place) for place in range(2)]
    outcome = get(name).combine(parts, Options(rank=2))
    assert outcome.factors.rank <= 2
    assert outcome.energy is None or 0.0 <= outcome.energy <= 1.0 + 1e-12
