"""Methods that work in small common spaces equal the papers' algorithms on dense matrices, and keep their laws.

Every reference takes the full matrices wᵢ·ΔWᵢ in float64 and uses dense singular value decompositions only.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NonFiniteError, OptionError
from loratools.maths.draws import key_of, uniform
from loratools.maths.lowrank import COMPUTE, Factors
from loratools.methods import Options, Part, get

few = settings(max_examples=12, deadline=None, derandomize=True)
NAMES = [
    "cart",
    "core-dare",
    "core-iso",
    "core-ties",
    "core-tsv",
    "iso-c",
    "iso-cts",
    "knots-dare",
    "knots-mean",
    "knots-ties",
    "lego",
    "tsv",
]
WITH = {law: [name for name in NAMES if law in get(name).laws] for law in ("identity", "order-free", "sum")}
# Linear, a 3x3 convolution flattened to (out, in·9), taller than wide, and with ranks that exceed what fits.
CASES = [
    ((14, 11), (2, 3, 1)),
    ((6, 36), (1, 2, 2)),
    ((30, 7), (3, 3)),
    ((6, 5), (3, 2, 3)),
    ((9, 12), (4,)),
]
WEIGHTS = [1.0, -0.5, 2.0]
TOLERANCE = 1e-9


def factors(shape, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator, dtype=COMPUTE)
    return Factors(up, torch.randn(rank, shape[1], generator=generator, dtype=COMPUTE))


def parts_of(shape, ranks, weights=WEIGHTS, seed=0):
    """Adapters of several ranks, with a scale of their own beside the weight."""
    return [
        Part(factors(shape, rank, seed + place), weight, 0.5 + place, place)
        for place, (rank, weight) in enumerate(zip(ranks, weights, strict=False))
    ]


def merged(name, parts, **chosen):
    return get(name).combine(parts, Options(**chosen))


def delta(name, parts, **chosen):
    return merged(name, parts, **chosen).factors.delta()


def changes(parts):
    return [part.weight * part.scale * part.factors.delta() for part in parts]


def assert_same(found, truth, size=None):
    size = float(truth.norm()) if size is None else size
    assert float((found - truth).norm()) <= TOLERANCE * size


def top(matrix, count=None):
    """The leading singular triplets that are not zero, as (u, sigma, v)."""
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    real = int((sigma > 1e-10 * sigma.max().clamp(min=1e-300)).sum())
    kept = real if count is None else min(count, real)
    return u[:, :kept], sigma[:kept], vh[:kept].T


def rank_of(matrix):
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-10))


def ties(matrices, density):
    trimmed = []
    for matrix in matrices:
        count = max(1, math.floor(density * matrix.numel() + 0.5))
        order = torch.argsort(matrix.abs().flatten(), descending=True, stable=True)
        kept = torch.zeros(matrix.numel(), dtype=COMPUTE)
        kept[order[:count]] = matrix.flatten()[order[:count]]
        trimmed.append(kept.view(matrix.shape))
    stacked = torch.stack(trimmed)
    sign = torch.sign(stacked.sum(dim=0))
    agreeing = torch.where(stacked * sign > 0, stacked, 0.0)
    return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)


def dare(matrices, density, seed, key):
    total = torch.zeros_like(matrices[0])
    for source, matrix in enumerate(matrices):
        mask = uniform(key_of(seed, key, source), 0, tuple(matrix.shape)) < density
        total += mask * matrix / density
    return total


def in_knots(taus, rule):
    """Stoica and others: elementwise on the components of the SVD of the concatenation."""
    u, sigma, v = top(torch.cat(taus, dim=1))
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))[0]
    u, v = u * largest.sign(), v * largest.sign()
    return u @ rule(list((sigma[:, None] * v.T).split(taus[0].shape[1], dim=1)))


def in_core(taus, rule):
    """Panariello and others, algorithm 1, on factors balanced by the square roots of the singular values."""
    halves = [(u * sigma.sqrt(), v * sigma.sqrt()) for u, sigma, v in map(top, taus)]
    left = top(torch.cat([up for up, _ in halves], dim=1))[0]
    right = top(torch.cat([down for _, down in halves], dim=1))[0]
    for basis in (left, right):
        basis *= basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))[0].sign()
    return left @ rule([left.T @ tau @ right for tau in taus]) @ right.T


def tsv(taus, counts):
    """Gargiulo and others, algorithm 1, with the polar factors by dense decompositions."""
    found = [top(tau, count) for tau, count in zip(taus, counts, strict=True)]
    u, v = (torch.cat([each[side] for each in found], dim=1) for side in (0, 2))
    sigma = torch.cat([each[1] for each in found])
    pu, _, wu = torch.linalg.svd(u, full_matrices=False)
    pv, _, wv = torch.linalg.svd(v, full_matrices=False)
    return (pu @ wu) @ torch.diag(sigma) @ (pv @ wv).T


def whole_dimension(taus):
    return min(sum(rank_of(tau) for tau in taus), *taus[0].shape)


def full_tsv(taus, _options):
    ranks, full = [rank_of(tau) for tau in taus], min(taus[0].shape)
    return tsv(taus, ranks if sum(ranks) <= full else [max(1, full // len(taus))] * len(taus))


def iso(taus, over):
    u, sigma, v = top(sum(taus))
    return sigma.sum() / over(taus, sigma) * u @ v.T


def iso_cts(taus, options):
    """Marczak and others, algorithm 2, sharing out the dimensions that the adapters have."""
    total, count = whole_dimension(taus), len(taus)
    common = int(total * options.common)
    own = min(round((total - common) / count), total // count)
    shared = total - own * count
    u, sigma, v = top(sum(taus), shared)
    us, sigmas, vs = [u], [sigma], [v]
    for tau in taus:
        rest = tau - u @ u.T @ tau
        real = int((torch.linalg.svdvals(rest) > 1e-10 * tau.norm()).sum())
        each = top(rest, min(own, real))
        for collected, new in zip((us, sigmas, vs), each, strict=True):
            collected.append(new)
    left, right, level = torch.cat(us, dim=1), torch.cat(vs, dim=1), torch.cat(sigmas).mean()
    pu, _, wu = torch.linalg.svd(left, full_matrices=False)
    pv, _, wv = torch.linalg.svd(right, full_matrices=False)
    return level * (pu @ wu) @ (pv @ wv).T


def cart(taus, options):
    """Choi and others: the mean and what each differs from it by, truncated."""
    kept = options.part_rank or math.ceil(0.08 * whole_dimension(taus))
    mean = sum(taus) / len(taus)
    total = torch.zeros_like(mean)
    for tau in taus:
        u, sigma, v = top(tau - mean, kept) if len(taus) > 1 else top(torch.zeros_like(mean))
        total += u @ torch.diag(sigma) @ v.T
    return mean + options.lam * total


REFERENCES = {
    "knots-mean": lambda taus, options: sum(taus) / len(taus),
    "knots-ties": lambda taus, options: in_knots(taus, lambda each: ties(each, options.density)),
    "knots-dare": lambda taus, options: in_knots(
        taus, lambda each: dare(each, options.density, options.seed, options.key)
    ),
    "core-ties": lambda taus, options: in_core(taus, lambda each: ties(each, options.density)),
    "core-dare": lambda taus, options: in_core(
        taus, lambda each: dare(each, options.density, options.seed, options.key)
    ),
    "core-tsv": lambda taus, options: tsv(taus, [max(1, whole_dimension(taus) // len(taus))] * len(taus)),
    "core-iso": lambda taus, options: iso(taus, lambda taus, sigma: whole_dimension(taus)),
    "tsv": full_tsv,
    "iso-c": lambda taus, options: iso(taus, lambda taus, sigma: len(sigma)),
    "iso-cts": iso_cts,
    "cart": cart,
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_it_is_the_papers_algorithm(name, case):
    chosen = Options(density=0.35, seed=3, key="module") if "ties" in name or "dare" in name else Options()
    parts = parts_of(*case)
    truth = REFERENCES[name](changes(parts), chosen)
    outcome = get(name).combine(parts, chosen)
    size = float(sum(changes(parts)).norm())
    assert_same(outcome.factors.delta(), truth, size)
    assert outcome.energy == 1.0
    if outcome.square is not None:
        assert outcome.square == pytest.approx(float(truth.square().sum()), rel=1e-9, abs=1e-18 * size**2)
    assert outcome.factors.rank <= min(*case[0], sum(case[1]))


@few
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([-2.0, -0.3, 0.4, 1.0, 1.7]), min_size=3, max_size=3),
    shape=st.sampled_from([(8, 13), (13, 8), (5, 18)]),
    name=st.sampled_from(sorted(REFERENCES)),
    seed=st.integers(0, 99),
)
def test_it_is_the_papers_algorithm_whatever_the_ranks_and_weights(ranks, weights, shape, name, seed):
    chosen = Options(density=0.3) if "ties" in name or "dare" in name else Options()
    parts = parts_of(shape, ranks, weights, seed)
    taus = changes(parts)
    size = sum(float(tau.norm()) for tau in taus)
    assert_same(get(name).combine(parts, chosen).factors.delta(), REFERENCES[name](taus, chosen), size)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("tsv", {"part_rank": 1}),
        ("core-tsv", {"part_rank": 2}),
        ("cart", {"part_rank": 2, "lam": 0.3}),
        ("iso-cts", {"common": 0.4}),
        ("iso-cts", {"common": 1.0}),
        ("iso-cts", {"common": 0.0}),
    ],
)
def test_options_are_the_papers(name, chosen):
    parts = parts_of((16, 12), (3, 2, 4))
    options = Options(**chosen)
    truth = (
        tsv(changes(parts), [options.part_rank] * 3)
        if name.endswith("tsv")
        else REFERENCES[name](changes(parts), options)
    )
    assert_same(get(name).combine(parts, options).factors.delta(), truth)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("cart", "knots-mean")])
def test_lambda_multiplies_the_result(name):
    parts = parts_of((14, 11), (2, 3))
    assert_same(delta(name, parts, lam=-0.7), -0.7 * delta(name, parts))


def best_groups(units, count):
    """The grouping up to sign with the least squared distances, by trying all of them."""
    best = (math.inf, None)
    for labels in itertools.product(range(count), repeat=len(units)):
        if labels[0] or set(labels) != set(range(count)):
            continue
        for signs in itertools.product((1.0, -1.0), repeat=len(units)):
            loss, centres = 0.0, []
            for label in range(count):
                mine = [
                    sign * unit for unit, sign, at in zip(units, signs, labels, strict=True) if at == label
                ]
                centre = sum(mine) / len(mine)
                loss += sum(float((unit - centre).square().sum()) for unit in mine)
                largest = sum(float(unit.abs().max()) for unit in mine) / len(mine)
                centres.append(centre / centre.abs().max() * largest)
            if loss < best[0] - 1e-12:
                best = (loss, centres)
    return best[1]


@pytest.mark.parametrize("seed", range(3))
def test_lego_joins_the_best_groups_of_units(seed):
    shape = (5, 4)
    near = factors(shape, 2, seed)
    noise = factors(shape, 2, seed + 50)
    other = Factors(near.up + 0.2 * noise.up, near.down + 0.2 * noise.down)
    parts = [Part(near, 1.0, 0.5), Part(other, 0.8, 1.0)]
    units = []
    for tau in changes(parts):
        u, sigma, v = top(tau)
        units += list(torch.cat([u * sigma.sqrt(), v * sigma.sqrt()]).T)
    for count in (1, 2, 3):
        truth = sum(torch.outer(centre[:5], centre[5:]) for centre in best_groups(units, count))
        assert_same(delta("lego", parts, rank=count), (2 / count) ** 0.5 * truth)
    assert torch.equal(delta("lego", parts), delta("lego", parts, rank=2))


def test_lego_repeats_a_seed():
    parts = parts_of((14, 11), (5, 6, 4))
    assert torch.equal(delta("lego", parts, seed=4, key="m"), delta("lego", parts, seed=4, key="m"))
    runs = [delta("lego", parts, seed=seed) for seed in range(4)]
    assert not all(torch.equal(run, runs[0]) for run in runs)


def test_lego_counts_units_of_negative_weight_against_the_others():
    part = factors((9, 8), 3, 1)
    whole = part.delta()
    assert_same(delta("lego", [Part(part), Part(part, -1.0)]), torch.zeros_like(whole), size=1.0)
    # Lengths 1 and √½ have the mean (1 + √½) / 2, and (1 − ½) / (1 + ½) of it remains.
    left = ((1 + 0.5**0.5) / 2) ** 2 / 3
    assert_same(delta("lego", [Part(part), Part(part, -0.5)]), left * whole)


@pytest.mark.parametrize("name", WITH["identity"])
def test_one_adapter_at_weight_one_is_itself(name):
    for part in (Part(factors((14, 11), 4, 2)), Part(factors((6, 5), 9, 2), 1.0)):
        assert_same(delta(name, [part]), part.factors.delta())


@pytest.mark.parametrize("name", WITH["order-free"])
def test_order_does_not_matter(name):
    parts = parts_of((14, 11), (2, 3, 4))
    for order in itertools.permutations(parts):
        assert_same(delta(name, list(order)), delta(name, parts))


@pytest.mark.parametrize("name", WITH["sum"])
def test_density_one_is_the_sum(name):
    parts = parts_of((14, 11), (2, 3, 4))
    assert_same(delta(name, parts, density=1.0), sum(changes(parts)))


@pytest.mark.parametrize("factor", [0.25, -3.0, 1e-6])
@pytest.mark.parametrize("name", NAMES)
def test_weights_scale_the_result(name, factor):
    parts = parts_of((14, 11), (2, 3, 1))
    scaled = [Part(part.factors, part.weight * factor, part.scale, part.source) for part in parts]
    assert_same(delta(name, scaled), factor * delta(name, parts))


@pytest.mark.parametrize("name", NAMES)
def test_weight_zero_is_absence(name):
    parts = parts_of((14, 11), (2, 3, 1))
    with_zero = [parts[0], Part(factors((14, 11), 5, 9), 0.0), *parts[1:]]
    assert torch.equal(delta(name, with_zero), delta(name, parts))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_change_counts_and_not_how_it_is_factored(name):
    parts = parts_of((14, 11), (2, 3, 1))
    regauged = []
    for place, part in enumerate(parts):
        mixed = factors((part.factors.rank, part.factors.rank), part.factors.rank, 70 + place).delta()
        up = part.factors.up @ mixed * 1e4
        down = torch.linalg.solve(mixed, part.factors.down) / 1e4
        # Two more columns that cancel, and one that is zero: factors of a lower rank than they have columns.
        extra = factors((14, 11), 1, 80 + place)
        zero = torch.zeros(1, 11, dtype=COMPUTE)
        wide = Factors(
            torch.cat([up, extra.up, -extra.up, extra.up], dim=1),
            torch.cat([down, extra.down, extra.down, zero]),
        )
        regauged.append(Part(wide, part.weight, part.scale, part.source))
    found, truth = delta(name, regauged), delta(name, parts)
    assert float((found - truth).norm()) <= 1e-7 * float(truth.norm())


@pytest.mark.parametrize("name", NAMES)
def test_opposite_adapters_cancel(name):
    part = factors((14, 11), 3, 4)
    turned = torch.linalg.qr(factors((3, 3), 3, 5).delta()).Q
    other = Factors(part.up @ turned, turned.T @ part.down)
    for opposite in (Part(part, -1.0), Part(other, -1.0), Part(part, 1.0, -1.0)):
        outcome = merged(name, [Part(part), opposite], key="m", density=1.0 if "dare" in name else 0.2)
        assert float(outcome.factors.delta().norm()) <= 1e-7 * float(part.delta().norm())
        assert outcome.energy == 1.0


@pytest.mark.parametrize(
    ("name", "share"),
    [("tsv", 1.0), ("core-tsv", 1.0), ("knots-mean", 1.0), ("lego", 1.0), ("cart", 1.0)],
)
def test_identical_adapters_merge_to_themselves(name, share):
    part = factors((14, 11), 3, 4)
    turned = torch.linalg.qr(factors((3, 3), 3, 5).delta()).Q
    other = Factors(part.up @ turned, turned.T @ part.down)
    found = delta(name, [Part(part), Part(other)])
    assert float((found - share * part.delta()).norm()) <= 1e-7 * float(part.delta().norm())


def test_iso_gives_no_strength_to_directions_that_no_adapter_has():
    part = factors((14, 11), 3, 4)
    u, sigma, v = top(part.delta())
    same = [Part(part), Part(part)]
    assert_same(delta("iso-c", same), 2 * sigma.mean() * u @ v.T)
    assert_same(delta("core-iso", same), 2 * sigma.sum() / 6 * u @ v.T)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_without_content_do_no_harm(name):
    empty = Factors(torch.zeros(14, 4, dtype=COMPUTE), factors((14, 11), 4, 3).down)
    outcome = merged(name, [Part(empty), Part(empty, 2.0)])
    assert not outcome.factors.delta().any()
    assert (outcome.factors.rank, outcome.energy) == (1, 1.0)
    parts = parts_of((14, 11), (2, 3))
    found = delta(name, [*parts, Part(empty, 1.0, 1.0, 2)])
    assert bool(found.isfinite().all())
    if name in ("tsv", "iso-c", "core-iso", "knots-ties", "core-ties", "knots-dare", "core-dare"):
        assert_same(found, delta(name, parts))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", NAMES)
def test_size_does_not_matter(name, scale):
    parts = parts_of((14, 11), (2, 3))
    small = [Part(part.factors, part.weight, part.scale * scale, part.source) for part in parts]
    assert_same(delta(name, small) / scale, delta(name, parts))


@pytest.mark.parametrize("rank", [1, 3, 50])
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("lego", "iso-c", "core-iso", "iso-cts")]
)
def test_a_rank_gives_the_best_approximation(name, rank):
    parts = parts_of((14, 11), (2, 3, 1))
    whole, outcome = delta(name, parts), merged(name, parts, rank=rank)
    sigma = torch.linalg.svdvals(whole)
    error = float((outcome.factors.delta() - whole).norm())
    assert error == pytest.approx(float(sigma[rank:].norm()), rel=1e-9, abs=1e-10)
    assert outcome.energy == pytest.approx(
        float(sigma[:rank].square().sum() / sigma.square().sum()), abs=1e-12
    )
    assert outcome.factors.rank == min(rank, rank_of(whole))


@pytest.mark.parametrize("name", ["iso-c", "core-iso"])
def test_a_rank_keeps_what_was_strongest_before_levelling(name):
    parts = parts_of((14, 11), (2, 3, 1))
    level = float(torch.linalg.svdvals(delta(name, parts))[0])
    u, _, v = top(sum(changes(parts)), 2)
    outcome = merged(name, parts, rank=2)
    assert_same(outcome.factors.delta(), level * u @ v.T)
    assert outcome.energy == pytest.approx(2 / 6)


def test_a_rank_of_iso_cts_keeps_what_was_strongest_before_levelling():
    parts = parts_of((14, 11), (2, 3, 1))
    whole = delta("iso-cts", parts)
    outcome = merged("iso-cts", parts, rank=2)
    kept = outcome.factors.delta()
    assert rank_of(kept) == 2
    assert outcome.energy == pytest.approx(1 - float((whole - kept).square().sum() / whole.square().sum()))
    assert outcome.energy == pytest.approx(2 / rank_of(whole))
    # The two largest singular values are common ones, whose vectors the orthogonalisation hardly turns.
    u = top(sum(changes(parts)), 2)[0]
    assert float((u.T @ kept).norm()) > 0.9 * float(kept.norm())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lego"])
def test_dare_masks_depend_on_seed_module_and_adapter(name):
    parts = parts_of((14, 11), (2, 3))
    first = delta(name, parts, key="one")
    assert torch.equal(first, delta(name, parts, key="one"))
    other_sources = [Part(part.factors, part.weight, part.scale, part.source + 5) for part in parts]
    others = [
        delta(name, parts, key="two"),
        delta(name, parts, key="one", seed=1),
        delta(name, other_sources, key="one"),
    ]
    for other in others:
        assert (not torch.allclose(first, other)) == name.endswith("dare")


@pytest.mark.parametrize("name", ["knots-dare", "core-dare"])
def test_dare_is_the_sum_on_average(name):
    parts = parts_of((14, 11), (2, 3))
    truth = sum(changes(parts))
    runs = [delta(name, parts, seed=seed, density=0.5) for seed in range(80)]
    average = sum(runs) / len(runs)
    spread = float(torch.stack([run - truth for run in runs]).square().sum(dim=(1, 2)).mean()) ** 0.5
    assert float((average - truth).norm()) < 1.5 * spread / len(runs) ** 0.5
    assert spread > 0.2 * float(truth.norm())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "knots-mean"])
def test_a_space_as_large_as_the_matrix_is_told(name):
    assert merged(name, parts_of((14, 11), (5, 5))).note == ""
    note = merged(name, parts_of((14, 11), (5, 6))).note
    assert "add up to 11 of 11" in note


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_refused(name):
    broken = factors((14, 11), 3, 1)
    broken.down[1, 2] = math.nan
    with pytest.raises(NonFiniteError):
        delta(name, [Part(broken), Part(factors((14, 11), 2, 2))])


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("tsv", {"part_rank": 0}, "part-rank is 0.*whole number of at least 1"),
        ("iso-cts", {"common": 1.2}, r"common is 1.2.*\[0, 1\]"),
        ("core-dare", {"density": 0.0}, r"density is 0.0.*\(0, 1\]"),
        ("lego", {"rank": 0}, "rank is 0"),
    ],
)
def test_values_out_of_range_are_refused(name, chosen, message):
    with pytest.raises(OptionError, match=message):
        delta(name, [Part(factors((14, 11), 2, 2))], **chosen)
