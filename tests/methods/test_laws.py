"""Laws of merging, judged by ΔW in float64."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NonFiniteError, OptionError, ShapeError
from loratools.maths.lowrank import COMPUTE, Factors
from loratools.methods import Options, Part, get, methods, options

few = settings(max_examples=20, deadline=None, derandomize=True)
NAMES = sorted(methods())
EXACT = ["concat", "linear"]


def having(law):
    """The methods that declare a law, in order of their names."""
    return [name for name in NAMES if law in get(name).laws]


# Methods of ΔW all declare laws. Those that declare none repeat another tool's arithmetic on factors of one rank.
ON_DELTA = [name for name in NAMES if get(name).laws]
WITHOUT = {
    law: [name for name in ON_DELTA if name not in having(law)] for law in ("homogeneous", "order-free")
}


def ranks(name, *wanted):
    """The ranks to try a method with: as wanted where it can take them."""
    return wanted if name in ON_DELTA else wanted[:1] * len(wanted)


def factors(rank=3, seed=0, dtype=COMPUTE, shape=(14, 11)):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator, dtype=COMPUTE)
    down = torch.randn(rank, shape[1], generator=generator, dtype=COMPUTE)
    return Factors(up.to(dtype), down.to(dtype))


def merged(name, parts, **chosen):
    return get(name).combine([Part(*part) for part in parts], Options(**chosen))


def assert_same(found, truth, size=None):
    size = float(truth.norm()) if size is None else size
    assert float((found - truth).norm()) <= 1e-10 * size


@few
@given(
    ranks=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    name=st.sampled_from(EXACT),
)
def test_exact_methods_give_the_weighted_sum(ranks, weights, name):
    parts = [(factors(rank, seed), weights[seed]) for seed, rank in enumerate(ranks)]
    outcome = merged(name, parts)
    truth = sum(weight * part.delta() for part, weight in parts)
    assert_same(
        outcome.factors.delta(), truth, size=10 * sum(float(part.delta().norm()) for part, _ in parts)
    )
    assert outcome.energy == 1.0
    assert outcome.factors.rank <= max(1, sum(ranks))


@few
@given(rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_linear_with_a_rank_is_the_nearest_matrix_of_that_rank(rank, seed):
    parts = [(factors(4, seed), 0.7), (factors(5, seed + 1), -1.2)]
    outcome = merged("linear", parts, rank=rank)
    truth = sum(weight * part.delta() for part, weight in parts)
    sigma = torch.linalg.svdvals(truth)
    error = float((outcome.factors.delta() - truth).norm())
    assert error == pytest.approx(float(sigma[rank:].norm()), rel=1e-9, abs=1e-10)
    energy = float(sigma[:rank].square().sum() / sigma.square().sum())
    assert outcome.energy == pytest.approx(energy, abs=1e-12)
    assert outcome.factors.rank == min(rank, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXACT)
def test_one_adapter_at_weight_one_is_itself_bit_for_bit(name, dtype):
    part = factors(dtype=dtype)
    found = merged(name, [(part, 1.0)]).factors
    assert found.up.dtype == dtype
    assert torch.equal(found.up, part.up)
    assert torch.equal(found.down, part.down)


@pytest.mark.parametrize("weight", [0.5, -1.0, -2.5])
@pytest.mark.parametrize("name", EXACT)
def test_one_adapter_keeps_its_rank_under_a_weight(name, weight):
    part = factors(5)
    found = merged(name, [(part, weight)]).factors
    assert found.rank == 5
    assert_same(found.delta(), weight * part.delta())


def test_linear_leaves_down_as_it_is_under_a_weight():
    part = factors(dtype=torch.float16)
    found = merged("linear", [(part, 0.8)]).factors
    assert torch.equal(found.down, part.down.double())


@pytest.mark.parametrize("name", having("order-free"))
def test_order_does_not_matter(name):
    parts = [(factors(3, 1), 1.0), (factors(4, 2), -0.5), (factors(2, 3), 2.0)][: get(name).most]
    forward, backward = merged(name, parts).factors, merged(name, parts[::-1]).factors
    assert_same(forward.delta(), backward.delta())


@pytest.mark.parametrize("name", NAMES)
def test_weight_zero_is_absence(name):
    one, two, three = ranks(name, 3, 4, 5)
    parts = [(factors(one, 1), 1.0), (factors(two, 2), -0.5)]
    with_zero = [parts[0], (factors(three, 3), 0.0), parts[1]]
    found, truth = merged(name, with_zero).factors, merged(name, parts).factors
    assert torch.equal(found.up, truth.up)
    assert torch.equal(found.down, truth.down)


@pytest.mark.parametrize("name", NAMES)
def test_all_weights_zero_is_zero(name):
    outcome = merged(name, [(factors(3, 1), 0.0), (factors(4, 2), -0.0)])
    assert (outcome.factors.shape, outcome.factors.rank, outcome.energy) == ((14, 11), 1, 1.0)
    assert not outcome.factors.delta().any()


@pytest.mark.parametrize("name", having("homogeneous"))
def test_scaling_all_weights_scales_the_result(name):
    parts = [(factors(3, 1), 1.0), (factors(4, 2), -0.5)]
    single = merged(name, parts).factors.delta()
    for scale in (0.25, -3.0):
        scaled = merged(name, [(part, weight * scale) for part, weight in parts]).factors.delta()
        assert_same(scaled, scale * single)


@pytest.mark.parametrize("name", WITHOUT["homogeneous"])
def test_weights_are_relative_where_they_do_not_scale_the_result(name):
    parts = [(factors(3, 1), 1.0), (factors(4, 2), -0.5)]
    single = merged(name, parts).factors.delta()
    for scale in (0.25, 3.0):
        scaled = merged(name, [(part, weight * scale) for part, weight in parts]).factors.delta()
        assert_same(scaled, single)


@pytest.mark.parametrize("name", WITHOUT["order-free"])
def test_a_method_that_is_not_order_free_has_an_order(name):
    parts = [(factors(3, 1), 1.0), (factors(4, 2), 0.5)]
    forward, backward = (merged(name, each).factors.delta() for each in (parts, parts[::-1]))
    assert float((forward - backward).norm()) > 1e-3 * float(forward.norm())


@pytest.mark.parametrize("name", having("order-free"))
def test_a_minus_a_is_zero(name):
    outcome = merged(name, [(factors(3), 1.0), (factors(3), -1.0)])
    assert_same(outcome.factors.delta(), torch.zeros(14, 11, dtype=COMPUTE), size=1.0)


def test_a_plus_a_keeps_the_rank_of_a_in_linear_and_adds_it_in_concat():
    part = factors(4)
    for name, rank in (("linear", 4), ("concat", 8)):
        found = merged(name, [(part, 1.0), (part, 1.0)]).factors
        assert found.rank == rank
        assert_same(found.delta(), 2 * part.delta())


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_changed(name):
    parts = [
        (factors(rank, rank), weight) for rank, weight in zip(ranks(name, 3, 4), (0.3, -0.5), strict=True)
    ]
    before = [(part.up.clone(), part.down.clone()) for part, _ in parts]
    merged(name, parts)
    for (part, _), (up, down) in zip(parts, before, strict=True):
        assert torch.equal(part.up, up)
        assert torch.equal(part.down, down)


@pytest.mark.parametrize("name", NAMES)
def test_non_finite_factors_are_refused(name):
    broken = factors(4)
    broken.up[2, 1] = math.nan
    if name == "concat" or name not in ON_DELTA:
        # Nothing is decomposed, so nothing is looked at: the caller sees NaN in what is written.
        assert merged(name, [(broken, 1.0), (factors(4, 1), 1.0)]).factors.up.isnan().any()
        return
    with pytest.raises(NonFiniteError):
        merged(name, [(broken, 1.0), (factors(2), 1.0)])


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_merged_is_refused(name):
    with pytest.raises(ShapeError, match=r"\(14, 11\)"):
        merged(name, [(factors(3), 1.0), (factors(3, shape=(14, 12)), 1.0)])
    with pytest.raises(OptionError, match="nothing to merge"):
        merged(name, [])
    with pytest.raises(OptionError, match="weight nan"):
        merged(name, [(factors(3), math.nan)])


def test_concat_never_truncates():
    with pytest.raises(OptionError, match=r"concat was given rank 4.*linear with --rank"):
        merged("concat", [(factors(3), 1.0)], rank=4)
    with pytest.raises(OptionError, match="never truncates"):
        options(get("concat"), rank=4)


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("linear", {"rank": 0}, "rank is 0.*whole number of at least 1"),
        ("linear", {"rank": 2.5}, "rank is 2.5"),
        ("ties", {"density": 0.0}, r"density is 0.0.*\(0, 1\]"),
        ("ties", {"density": 1.5}, r"density is 1.5.*\(0, 1\]"),
        ("ties", {"lam": math.inf}, "lambda is inf.*finite number"),
        ("ties", {"seed": -1}, "seed is -1"),
    ],
)
def test_values_out_of_range_name_the_option_and_the_range(name, chosen, message):
    with pytest.raises(OptionError, match=message):
        options(get(name), **chosen)
    with pytest.raises(OptionError, match=message):
        merged(name, [(factors(), 1.0)], **chosen)


def test_options_are_built_from_what_was_given():
    made = options(get("ties"), rank=None, density=0.5)
    assert made == Options(density=0.5)
    with pytest.raises(OptionError, match=r"linear has no option 'density'.*an option of .*\bties"):
        options(get("linear"), density=0.5)
    with pytest.raises(OptionError, match="no option 'colour'"):
        options(get("ties"), colour="red")


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(OptionError, match=f"'tiess'.*Known are {', '.join(NAMES)}") as caught:
        get("tiess", path="mix.yaml")
    assert caught.value.candidates[0] == "ties"
    assert caught.value.path == "mix.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_a_method_describes_itself(name):
    method = get(name)
    assert method.name == name
    assert method.summary.endswith(".")
    defaults = {field.name: field.default for field in fields(Options)}
    for option in method.options:
        assert option.default == defaults[option.field]
        option.validate(option.default)


def test_the_documented_laws_are_those_that_are_declared():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text("utf-8")
    table = page[page.index("| method | one is itself |") :].split("\n\n")[0].splitlines()[2:]
    laws = ("identity", "order-free", "homogeneous", "linear", "sum")
    stated = {}
    for line in table:
        names, *cells = line.strip("| ").split(" | ")
        held = {law for law, cell in zip(laws, cells, strict=True) if cell.strip() == "yes"}
        stated |= dict.fromkeys(re.findall("`([^`]+)`", names), held)
    assert stated == {name: set(get(name).laws) for name in ON_DELTA}
