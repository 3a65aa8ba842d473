"""The smallest rank that a rule is satisfied with, and ranks within a budget of bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import OptionError
from loratools.maths.rank import Rule, allocate, check_rule, needed, parse_size

SIGMA = np.array([4.0, 2.0, 1.0, 1.0, 0.0])
ENERGY = 22.0

spectra = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8).map(
    lambda found: np.array(sorted(found, reverse=True))
)


def rank_of(kind, value, **limits):
    return needed(Rule(kind, value, **limits), SIGMA, ENERGY, 5)


@pytest.mark.parametrize(
    ("kind", "value", "rank"),
    [
        ("rank", 3, 3),
        ("rank", 5, 4),
        ("rank", 99, 4),
        ("energy", 16 / 22, 1),
        ("energy", 16.001 / 22, 2),
        ("energy", 20 / 22, 2),
        ("energy", 1.0, 4),
        ("error", (6 / 22) ** 0.5, 1),
        ("error", (5.99 / 22) ** 0.5, 2),
        ("error", (1 / 22) ** 0.5, 3),
        ("error", 1e-9, 4),
        ("ratio", 0.51, 1),
        ("ratio", 0.5, 2),
        ("ratio", 0.26, 2),
        ("ratio", 0.25, 4),
        ("ratio", 1, 1),
        ("ratio", 1.9, 1),
        ("ratio", 2, 2),
        ("ratio", 4.1, 4),
    ],
)
def test_exactly_the_smallest_rank(kind, value, rank):
    assert rank_of(kind, value) == rank


def test_limits_come_after_the_rule():
    assert rank_of("ratio", 0.5, least=3) == 3
    assert rank_of("ratio", 0.5, least=9) == 4
    assert rank_of("energy", 1.0, most=2) == 2
    assert rank_of("rank", 3, most=2) == 2


def test_more_singular_values_are_asked_for_until_the_answer_is_certain():
    for rule, known in ((Rule("rank", 3), 3), (Rule("energy", 0.9), 2), (Rule("ratio", 0.49), 3)):
        answers = [needed(rule, SIGMA[:count], ENERGY, 5) for count in range(6)]
        assert answers[:known] == [None] * known
        assert set(answers[known:]) == {answers[-1]}
    assert needed(Rule("energy", 1.0, most=2), SIGMA[:2], ENERGY, 5) == 2
    assert needed(Rule("ratio", 0.5, least=4), SIGMA[:3], ENERGY, 5) is None


def test_a_zero_matrix_needs_nothing():
    for kind, value in (("rank", 3), ("energy", 0.9), ("error", 0.1), ("ratio", 0.5)):
        assert needed(Rule(kind, value), np.zeros(4), 0.0, 4) == 0


@given(sigma=spectra, value=st.floats(0.01, 1.0))
def test_energy_and_error_are_reached_and_not_by_one_rank_less(sigma, value):
    energy = float(np.square(sigma).sum())
    for kind in ("energy", "error"):
        rank = needed(Rule(kind, value), sigma, energy, sigma.size)
        lost = [float(np.square(sigma[k:]).sum()) for k in (rank, rank - 1)]
        allowed = energy * (1 - value if kind == "energy" else value**2)
        assert lost[0] <= allowed + 1e-12 * energy
        assert rank == 1 or lost[1] > allowed - 1e-12 * energy


@pytest.mark.parametrize(
    ("value", "rank"), [(2e-3, 1), (9e-4, 2), (1e-6, 2), (9e-7, 3), (2e-9, 3), (9e-10, 4), (9e-13, 5)]
)
def test_small_errors_are_told_apart(value, rank):
    """Their squares are below the rounding of the whole energy."""
    sigma = np.array([1.0, 1e-3, 0.99e-6, 0.99e-9, 0.99e-12])
    assert needed(Rule("error", value), sigma, float(np.square(sigma).sum()), 5) == rank
    # Where more may follow, what is lost is known no better than the whole.
    assert needed(Rule("error", 1e-12), sigma[:2], 1.0 + 1e-6 + 1e-12, 5) is None


@pytest.mark.parametrize(
    "rule",
    [
        Rule("rank", 0),
        Rule("rank", 2.5),
        Rule("energy", 0.0),
        Rule("energy", 1.1),
        Rule("error", float("nan")),
        Rule("ratio", 0.0),
        Rule("ratio", float("inf")),
        Rule("size", 3),
        Rule("rank", 3, least=0),
        Rule("rank", 3, least=4, most=3),
    ],
)
def test_rules_without_meaning_are_refused(rule):
    with pytest.raises(OptionError):
        check_rule(rule)


def best_kept(found, costs, budget):
    """The most energy that any choice of ranks keeps within the budget."""
    best = 0.0
    for ranks in itertools.product(*(range(sigma.size + 1) for sigma in found)):
        if sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget:
            best = max(best, kept(found, ranks))
    return best


def kept(found, ranks):
    return sum(float(np.square(sigma[:rank]).sum()) for sigma, rank in zip(found, ranks, strict=True))


short = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=4).map(
    lambda f: np.array(sorted(f, reverse=True))
)


@settings(max_examples=60)
@given(found=st.lists(short, min_size=1, max_size=3), budget=st.integers(0, 100))
def test_where_costs_are_equal_no_choice_keeps_more(found, budget):
    costs = [7] * len(found)
    ranks = allocate(found, costs, budget, least=0)
    assert sum(ranks) * 7 <= budget
    assert kept(found, ranks) == pytest.approx(best_kept(found, costs, budget), rel=1e-12, abs=1e-12)


@settings(max_examples=60)
@given(
    found=st.lists(short, min_size=1, max_size=3),
    costs=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    budget=st.integers(0, 60),
)
def test_where_costs_differ_at_most_one_value_more_could_be_kept(found, costs, budget):
    costs = costs[: len(found)]
    ranks = allocate(found, costs, budget, least=0)
    assert sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) <= budget
    largest = max(float(sigma[0]) ** 2 for sigma in found)
    assert best_kept(found, costs, budget) <= kept(found, ranks) + largest * (1 + 1e-12)


def test_limits_of_the_budget():
    found = [np.array([9.0, 8.0, 7.0]), np.array([1.0, 0.5, 0.0])]
    assert allocate(found, [10, 10], 40) == [3, 1]
    assert allocate(found, [10, 10], 40, most=2) == [2, 2]
    assert allocate(found, [10, 10], 1000) == [3, 2]
    assert allocate(found, [10, 10], 40, least=2) == [2, 2]
    with pytest.raises(OptionError, match="40 bytes, and 39"):
        allocate(found, [10, 10], 39, least=2)
    assert allocate([np.zeros(3)], [10], 0) == [0]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20MB", 20_000_000),
        ("20 MiB", 20 * 2**20),
        ("1.5gb", 1_500_000_000),
        ("3kib", 3072),
        ("1TB", 10**12),
        (" 123 ", 123),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "20 XB", "20M", "-3MB", "0", "infMB", "nan", "1e400", "20 M B"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(OptionError):
        parse_size(text)
