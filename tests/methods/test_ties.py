"""TIES on factors equals the paper's algorithm on dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.maths import tiles
from loratools.maths.lowrank import COMPUTE, Factors
from loratools.methods import Options, Part, get

few = settings(max_examples=40, deadline=None, derandomize=True)
OUT, IN = 9, 12


def integer_factors(rank, seed):
    """Factors whose product is exact in any order of summation, with many equal magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randint(-3, 4, (OUT, rank), generator=generator).to(COMPUTE)
    down = torch.randint(-2, 3, (rank, IN), generator=generator).to(COMPUTE)
    return Factors(up, down / 4)


def paper(task_vectors, density, lam, majority="total"):
    """Algorithm 1 of arXiv 2306.01708, step by step on flat task vectors; signs may be counted instead of summed."""
    trimmed = []
    for vector in task_vectors:
        keep = max(1, int(density * vector.numel() + 0.5))
        largest_first = sorted(range(vector.numel()), key=lambda at: (-abs(float(vector[at])), at))
        kept = torch.zeros_like(vector)
        for at in largest_first[:keep]:
            kept[at] = vector[at]
        trimmed.append(kept)
    merged = torch.zeros_like(task_vectors[0])
    for at in range(merged.numel()):
        values = [float(vector[at]) for vector in trimmed]
        total = sum((v > 0) - (v < 0) for v in values) if majority == "frequency" else sum(values)
        elected = (total > 0) - (total < 0)
        agreeing = [value for value in values if value * elected > 0]
        merged[at] = lam * sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


def ties(parts, **chosen):
    return get("ties").combine([Part(*part) for part in parts], Options(**chosen))


@few
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([-2.0, -0.5, 0.25, 1.0, 1.5]), min_size=4, max_size=4),
    density=st.sampled_from([0.001, 0.1, 0.2, 0.35, 0.5, 0.99, 1.0]),
    lam=st.sampled_from([1.0, 0.3, -2.0]),
    majority=st.sampled_from(["total", "frequency"]),
    seed=st.integers(0, 99),
)
def test_equals_the_paper(ranks, weights, density, lam, majority, seed):
    parts = [(integer_factors(rank, seed + at), weights[at]) for at, rank in enumerate(ranks)]
    vectors = [(part.delta() * weight).flatten() for part, weight in parts]
    truth = paper(vectors, density, lam, majority).view(OUT, IN)
    outcome = ties(parts, density=density, lam=lam, majority=majority, rank=OUT)
    assert outcome.energy == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(outcome.factors.delta(), truth, rtol=0, atol=1e-12 * (1 + float(truth.norm())))


def test_the_majority_by_number_outvotes_a_larger_value():
    generator = torch.Generator().manual_seed(0)
    small = Factors(torch.ones(OUT, 1, dtype=COMPUTE), torch.ones(1, IN, dtype=COMPUTE))
    large = Factors(-torch.rand(OUT, 1, generator=generator, dtype=COMPUTE) - 3.0, small.down)
    parts = [(small, 1.0), (small, 0.5), (large, 1.0)]
    by_total = ties(parts, density=1.0).factors.delta()
    torch.testing.assert_close(by_total, large.delta(), rtol=0, atol=1e-12)
    by_number = ties(parts, density=1.0, majority="frequency").factors.delta()
    torch.testing.assert_close(by_number, 0.75 * small.delta(), rtol=0, atol=1e-12)


def test_the_order_elects_nothing_where_values_cancel():
    part = integer_factors(3, 5)
    weights = (0.1, 0.2, -0.3)
    for order in (weights, weights[::-1], (0.2, -0.3, 0.1)):
        assert float(ties([(part, weight) for weight in order]).factors.delta().norm()) < 1e-12


def test_one_adapter_is_its_trimmed_change_times_its_weight():
    part = integer_factors(3, 5)
    trimmed = paper([part.delta().flatten()], 0.2, 1.0).view(OUT, IN)
    for weight in (1.0, -0.75):
        found = ties([(part, weight)], rank=OUT).factors.delta()
        torch.testing.assert_close(found, weight * trimmed, rtol=0, atol=1e-12)


def test_one_adapter_at_density_one_is_itself():
    part = integer_factors(3, 5)
    outcome = ties([(part, 1.0)], density=1.0)
    torch.testing.assert_close(outcome.factors.delta(), part.delta(), rtol=0, atol=1e-12)
    assert outcome.factors.rank == 3


def test_default_rank_is_the_sum_and_energy_is_what_it_retains():
    parts = [(integer_factors(2, 1), 1.0), (integer_factors(3, 2), 1.0)]
    whole = ties(parts, rank=OUT).factors.delta()
    sigma = torch.linalg.svdvals(whole).square()
    for rank, chosen in ((5, {}), (2, {"rank": 2})):
        outcome = ties(parts, **chosen)
        assert outcome.factors.rank == rank
        assert outcome.energy == pytest.approx(float(sigma[:rank].sum() / sigma.sum()), abs=1e-12)


def wide_parts(shape=(150, 130)):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            Factors(
                torch.randn(shape[0], rank, generator=generator, dtype=COMPUTE),
                torch.randn(rank, shape[1], generator=generator, dtype=COMPUTE),
            ),
            weight,
        )
        for rank, weight in ((4, 1.0), (6, -0.6))
    ]


@pytest.mark.parametrize("elements", [1, 900, 1 << 18])
def test_neither_memory_limit_nor_tiles_change_the_result(monkeypatch, elements):
    monkeypatch.setattr(tiles, "_TILE_ELEMENTS", elements)
    parts = wide_parts()
    held = ties(parts, max_tile_bytes=64 << 20)
    streamed = ties(parts, max_tile_bytes=0)
    assert torch.equal(held.factors.up, streamed.factors.up)
    assert torch.equal(held.factors.down, streamed.factors.down)
    assert held.energy == streamed.energy
    truth = paper([(part.delta() * weight).flatten() for part, weight in parts], 0.2, 1.0).view(150, 130)
    sigma = torch.linalg.svdvals(truth).square()
    best = float(sigma[:10].sum() / sigma.sum())
    assert 0.99 * best <= held.energy <= best + 1e-12
    lost = float((held.factors.delta() - truth).square().sum() / sigma.sum())
    assert held.energy == pytest.approx(1 - lost, abs=1e-9)


def test_the_seed_repeats_a_result():
    first, again = ties(wide_parts(), seed=7, rank=3), ties(wide_parts(), seed=7, rank=3)
    assert torch.equal(first.factors.up, again.factors.up)
