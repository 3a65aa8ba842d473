"""Methods on every element of ΔW equal the papers' algorithms on dense matrices, and keep their laws."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NonFiniteError, OptionError
from loratools.maths import tiles
from loratools.maths.elect import elected_mean
from loratools.maths.lowrank import COMPUTE, Compressed, Factors
from loratools.methods import Options, Part, _elementwise, get, options
from tests.methods.elementwise_papers import paper, task_vectors

few = settings(max_examples=10, deadline=None, derandomize=True)
NAMES = [
    "breadcrumbs",
    "breadcrumbs-ties",
    "dare-linear",
    "dare-ties",
    "della",
    "della-linear",
    "magnitude",
    "sce",
    "ties",
]
WITH = {law: [name for name in NAMES if law in get(name).laws] for law in ("identity", "linear", "sum")}
RANDOM = ["dare-linear", "dare-ties", "della", "della-linear"]
ELECTING = ["breadcrumbs-ties", "dare-ties", "della", "ties"]
# Linear, a 3x3 convolution flattened to (out, in·9), taller than wide, and with ranks that exceed what fits.
CASES = [
    ((9, 12), (2, 3, 1)),
    ((4, 27), (1, 2, 2)),
    ((20, 5), (3, 3)),
    ((5, 4), (3, 2, 3)),
    ((9, 12), (4,)),
]
WEIGHTS = [1.0, -0.5, 2.0]
TOLERANCE = 1e-10


def factors(shape, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator, dtype=COMPUTE)
    return Factors(up, torch.randn(rank, shape[1], generator=generator, dtype=COMPUTE))


def exact_factors(shape, rank, seed):
    """Small integers: products and sums are exact in any order, and many magnitudes are equal."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randint(-3, 4, (shape[0], rank), generator=generator).to(COMPUTE)
    return Factors(up, torch.randint(-2, 3, (rank, shape[1]), generator=generator).to(COMPUTE) / 4)


def parts_of(shape, ranks, weights=WEIGHTS, seed=0, make=factors):
    """Adapters of several ranks, with a scale of their own beside the weight."""
    return [
        Part(make(shape, rank, seed + place), weight, 0.5 + place, place)
        for place, (rank, weight) in enumerate(zip(ranks, weights, strict=False))
    ]


def merged(name, parts, **chosen):
    """ΔW at full rank."""
    rank = min(parts[0].factors.shape)
    outcome = get(name).combine(parts, Options(rank=rank, **chosen))
    assert outcome.energy == pytest.approx(1.0, abs=1e-12)
    return outcome.factors.delta()


def assert_same(found, truth):
    assert float((found - truth).norm()) <= TOLERANCE * (1 + float(truth.norm()))


@pytest.mark.parametrize("name", NAMES)
@few
@given(
    case=st.sampled_from(CASES),
    density=st.sampled_from([0.001, 0.35, 0.5, 0.98]),
    lam=st.sampled_from([1.0, -1.5]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_equals_the_paper(name, case, density, lam, seed, data):
    fields = {option.field for option in get(name).options}
    chosen = {"density": density, "lam": lam, "seed": seed, "key": "a.module"}
    if "epsilon" in fields:
        chosen["epsilon"] = data.draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    if "gamma" in fields:
        chosen["gamma"] = data.draw(st.sampled_from([0.0, 0.05, 0.4, 0.9]))
    if "majority" in fields:
        chosen["majority"] = data.draw(st.sampled_from(["total", "frequency"]))
    parts = parts_of(*case, seed=seed)
    assert_same(merged(name, parts, **chosen), paper(name, parts, **chosen))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sce"])
@pytest.mark.parametrize("density", [0.2, 0.6])
def test_equal_magnitudes_go_by_position(name, density):
    parts = parts_of((9, 12), (2, 3), [1.0, 0.5], make=exact_factors)
    assert_same(merged(name, parts, density=density), paper(name, parts, density=density))


@pytest.mark.parametrize("density", [0.05, 0.4])
def test_equal_variances_go_by_position(density):
    # Of two adapters means are exact, and so are variances.
    parts = [Part(exact_factors((9, 12), rank, rank), 1.0, 1.0, rank) for rank in (1, 2)]
    assert_same(merged("sce", parts, density=density), paper("sce", parts, density=density))


@pytest.mark.parametrize("name", NAMES)
def test_order_does_not_matter(name):
    parts = parts_of((9, 12), (2, 3, 1))
    truth = merged(name, parts, key="m")
    for order in itertools.permutations(parts):
        assert_same(merged(name, order, key="m"), truth)


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_the_result_grow_together(name):
    truth = merged(name, parts_of((9, 12), (2, 3, 1)), key="m")
    larger = parts_of((9, 12), (2, 3, 1), [3.0 * weight for weight in WEIGHTS])
    assert_same(merged(name, larger, key="m"), 3.0 * truth)
    assert_same(merged(name, parts_of((9, 12), (2, 3, 1)), key="m", lam=-0.25), -0.25 * truth)


def test_which_methods_have_which_law():
    linear = ["breadcrumbs", "dare-linear", "della-linear", "magnitude"]
    assert {"identity": ["sce"], "linear": linear, "sum": linear} == WITH
    assert all({"order-free", "homogeneous"} <= set(get(name).laws) for name in NAMES)


@pytest.mark.parametrize("name", WITH["linear"])
def test_linear_in_each_weight(name):
    at = [merged(name, parts_of((9, 12), (2, 3), [1.0, weight]), key="m") for weight in (-1.0, 0.5, 2.0)]
    assert_same(at[1], 0.5 * at[0] + 0.5 * at[2])


@pytest.mark.parametrize("name", WITH["sum"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_density_one_is_the_sum(name, case):
    parts = parts_of(*case)
    assert_same(merged(name, parts, density=1.0), sum(task_vectors(parts)))


@pytest.mark.parametrize("name", sorted({*ELECTING, "sce", *WITH["sum"]}))
def test_one_adapter_at_density_one_is_itself(name):
    parts = parts_of((9, 12), (4,), [-0.75])
    assert_same(merged(name, parts, density=1.0), sum(task_vectors(parts)))


def test_sce_of_equal_adapters_is_that_adapter():
    shared = factors((9, 12), 3, 0)
    turned = Factors(shared.up * 0.3, shared.down / 0.3)
    for parts in ([Part(shared)], [Part(shared), Part(turned), Part(shared)]):
        assert_same(merged("sce", parts, density=0.1), shared.delta())


def test_sce_gives_a_vanishing_adapter_no_say():
    # Its square underflows, and where it alone has the elected sign there is nothing to average.
    large, small = Factors(torch.eye(4, dtype=COMPUTE), torch.eye(4, dtype=COMPUTE)), factors((4, 4), 2, 1)
    parts = [Part(large), Part(small, 1e-170)]
    assert_same(merged("sce", parts, density=1.0), large.delta())


@pytest.mark.parametrize("name", NAMES)
def test_opposite_adapters_leave_nothing(name):
    shared = factors((9, 12), 3, 0)
    # One position, so one mask: they cancel wherever it lies.
    outcome = get(name).combine([Part(shared, 0.3), Part(shared, 0.7), Part(shared, -1.0)])
    assert float(outcome.factors.delta().norm()) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_zero_adapters_give_zero(name):
    nothing = Factors(torch.zeros(6, 2, dtype=COMPUTE), torch.zeros(2, 7, dtype=COMPUTE))
    outcome = get(name).combine([Part(nothing), Part(nothing, 2.0, 0.0, 1)])
    assert not outcome.factors.delta().any()
    assert outcome.energy == 1.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_non_finite_factors_are_refused(name, density):
    # Infinities of both signs: a mask or an election could hide them.
    for value in (math.nan, math.inf, -math.inf):
        broken = factors((9, 12), 2, 0)
        broken.up[3, 1] = value
        parts = [Part(factors((9, 12), 2, 1)), Part(broken, source=4)]
        with pytest.raises(NonFiniteError, match="adapter 5"):
            get(name).combine(parts, Options(density=density))


def whole_result(monkeypatch, name, parts, **chosen):
    """The merged matrix itself, before anything is decomposed."""
    seen = []

    def remember(sweep, shape, rank, *, seed):
        seen.extend([tile for _, tile in sweep()])
        return Compressed(Factors(torch.zeros(shape[0], 1), torch.zeros(1, shape[1])), 1.0, torch.zeros(1))

    with monkeypatch.context() as patched:
        patched.setattr(_elementwise, "compress_operator", remember)
        get(name).combine(parts, Options(key="m", **chosen))
    return torch.cat(seen)


@pytest.mark.parametrize("name", NAMES)
def test_neither_tiles_nor_memory_nor_threads_change_a_bit(monkeypatch, name):
    parts = parts_of((13, 29), (2, 3), [1.0, -0.5], make=exact_factors)
    truth = whole_result(monkeypatch, name, parts)
    assert truth.count_nonzero() > 0
    before = torch.get_num_threads()
    try:
        for elements, memory, threads in ((1, 0, 1), (300, 64 << 20, 2), (300, 0, 1), (1 << 18, 0, 2)):
            monkeypatch.setattr(tiles, "_TILE_ELEMENTS", elements)
            torch.set_num_threads(threads)
            found = whole_result(monkeypatch, name, parts, max_tile_bytes=memory)
            assert torch.equal(found, truth)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_workers_side_by_side_change_nothing(name):
    parts = parts_of((40, 33), (2, 3))

    def work(key):
        return get(name).combine(parts, Options(key=key, rank=4))

    keys = ["a", "b", "c", "d"]
    alone = [work(key) for key in keys]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(alone, pool.map(work, keys), strict=True):
            assert torch.equal(one.factors.up, other.factors.up)
            assert torch.equal(one.factors.down, other.factors.down)


@pytest.mark.parametrize("name", NAMES)
def test_streaming_a_wide_matrix_captures_nearly_the_best_energy(monkeypatch, name):
    monkeypatch.setattr(tiles, "_TILE_ELEMENTS", 1400)
    parts = parts_of((80, 70), (2, 3))
    truth = whole_result(monkeypatch, name, parts)
    outcome = get(name).combine(parts, Options(key="m", max_tile_bytes=0))
    sigma = torch.linalg.svdvals(truth).square()
    best = float(sigma[:5].sum() / sigma.sum())
    assert outcome.factors.rank == 5
    assert 0.99 * best <= outcome.energy <= best + 1e-12
    lost = float((outcome.factors.delta() - truth).square().sum() / sigma.sum())
    assert outcome.energy == pytest.approx(1 - lost, abs=1e-9)
    assert outcome.square == pytest.approx(float(outcome.factors.delta().square().sum()), rel=1e-9)


@pytest.mark.parametrize("name", RANDOM)
def test_masks_belong_to_seed_module_and_adapter(name):
    def one(seed=0, key="m", source=0):
        return merged(name, [Part(factors((9, 12), 3, 0), source=source)], seed=seed, key=key)

    assert torch.equal(one(), one())
    for other in (one(seed=1), one(key="n"), one(source=1)):
        assert not torch.equal(other != 0, one() != 0)


@pytest.mark.parametrize("name", ["dare-linear", "della-linear"])
def test_the_expectation_is_the_change_itself(monkeypatch, name):
    part = Part(factors((12, 20), 3, 0))
    chosen = {"density": 0.3, "epsilon": 0.4} if name == "della-linear" else {"density": 0.3}
    repeats = 200
    drawn = torch.stack(
        [whole_result(monkeypatch, name, [part], seed=seed, **chosen) for seed in range(repeats)]
    )
    truth = part.factors.delta()
    # Standard deviations of a mean of x/p with probability p: |x|·sqrt((1 − p)/p/n), the largest at the least p.
    least = 0.11 if name == "della-linear" else 0.3
    limit = 5 * truth.abs() * ((1 - least) / least / repeats) ** 0.5
    assert bool(((drawn.mean(0) - truth).abs() <= limit).all())
    kept = (drawn != 0).double().mean(0)
    assert float(kept.mean()) == pytest.approx(0.3, abs=5 * (0.21 / kept.numel() / repeats) ** 0.5)
    if name == "della-linear":
        order = truth.abs().sort(dim=1).indices
        # Steps of 0.4 / 20 from 0.11 to 0.49.
        expected = 0.11 + 0.02 * torch.arange(20, dtype=COMPUTE)
        found = kept.gather(1, order).mean(0)
        assert float((found - expected).abs().max()) < 5 * (0.25 / 12 / repeats) ** 0.5


def test_shares_weigh_the_mean_and_not_the_election():
    pieces = [torch.tensor([2.0, 2.0, 0.0]), torch.tensor([-3.0, 4.0, 0.0]), torch.tensor([0.5, 0.0, 0.0])]
    found = elected_mean(iter(pieces), shares=[3.0, 1.0, 1.0])
    # −0.5 in all at the first; zeros do not count at the second.
    assert found.tolist() == [-3.0, 2.5, 0.0]
    assert elected_mean(iter(pieces), "frequency", [3.0, 1.0, 1.0]).tolist() == [1.625, 2.5, 0.0]


def test_votes_that_tie_elect_nothing():
    pieces = [torch.tensor([2.0, 1.0]), torch.tensor([-3.0, -1.0])]
    assert elected_mean(iter(pieces)).tolist() == [-3.0, 0.0]
    assert elected_mean(iter(pieces), "frequency").tolist() == [0.0, 0.0]


def test_rounding_elects_no_sign():
    parts = [torch.tensor([0.1 + 0.2], dtype=COMPUTE), torch.tensor([-0.3], dtype=COMPUTE)]
    assert float(sum(parts)) != 0.0
    assert elected_mean(iter(parts)).tolist() == [0.0]


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("magnitude", {"density": 0.0}, r"density is 0.0.*\(0, 1\]"),
        ("dare-linear", {"density": 1.5}, r"density is 1.5.*\(0, 1\]"),
        ("dare-ties", {"seed": -1}, "seed is -1"),
        ("della", {"epsilon": 1.5}, r"epsilon is 1.5.*\[0, 1\]"),
        ("della-linear", {"epsilon": -0.1}, r"epsilon is -0.1.*\[0, 1\]"),
        ("breadcrumbs", {"gamma": 1.0}, r"gamma is 1.0.*\[0, 1\)"),
        ("breadcrumbs-ties", {"gamma": -0.5}, r"gamma is -0.5.*\[0, 1\)"),
        ("ties", {"majority": "most"}, "majority is 'most'.*total or frequency"),
        ("sce", {"lam": math.nan}, "lambda is nan"),
        ("magnitude", {"majority": "total"}, "magnitude has no option 'majority'"),
        ("sce", {"epsilon": 0.1}, "sce has no option 'epsilon'"),
    ],
)
def test_values_out_of_range_name_the_option_and_the_range(name, chosen, message):
    with pytest.raises(OptionError, match=message):
        options(get(name), **chosen)
