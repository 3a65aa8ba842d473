"""Which merge method is suggested: rule by rule, and from adapters that are made to fit a rule."""

from __future__ import annotations

import math
from pathlib import Path

import factories as make
import pytest
import torch

import loratools as lt
from loratools import methods
from loratools.ops._compare_suggest import suggestion
from loratools.ops.compare import compare
from loratools.ops.compare_results import ComparedPair, Relation
from tests.cli.running import invoke

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
OUT, INTO, RANK = 96, 80, 4


def written(folder: Path, *pairs):
    for number, (up, down) in enumerate(pairs):
        tensors = {KEY.format("A"): down.contiguous(), KEY.format("B"): up.contiguous()}
        make.write_safetensors(folder / f"{number}.safetensors", tensors, None)
    return [folder / f"{number}.safetensors" for number in range(len(pairs))]


def factors(seed, rank=RANK):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(OUT, rank, generator=generator), torch.randn(rank, INTO, generator=generator)


def suggested(paths):
    found = compare(paths, suggest=True, exact=True).suggestion
    assert found is not None
    assert found.method in methods.methods()
    return found


def test_unrelated_adapters_are_added(tmp_path: Path):
    found = suggested(written(tmp_path, factors(1), factors(2)))
    assert (found.method, found.weights) == ("linear", (1.0, 1.0))
    assert found.figures["energy of the sum"] == pytest.approx(1.0, abs=0.1)
    assert "orthogonal" in found.reasons[0]


def test_the_same_directions_used_otherwise_are_made_orthogonal(tmp_path: Path):
    up, down = factors(1)
    turn = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(4))).Q
    turn -= torch.eye(RANK) * turn.trace() / RANK  # orthogonal to the identity, as matrices
    columns, rows = torch.linalg.qr(up).Q, torch.linalg.qr(down.T).Q.T
    found = suggested(written(tmp_path, (columns, rows), (columns @ turn, rows)))
    assert found.method == "tsv"
    assert found.figures["excess overlap"] == pytest.approx(1.0, abs=1e-6)
    assert abs(found.figures["mean cosine"]) < 1e-6


def test_near_copies_are_averaged(tmp_path: Path):
    up, down = factors(1)
    other = factors(2)[0]
    found = suggested(written(tmp_path, (up, down), (up + 0.3 * other, down)))
    assert (found.method, found.weights) == ("linear", (0.5, 0.5))
    assert "Average" in found.reasons[0]


def test_opposites_are_elected_between(tmp_path: Path):
    up, down = factors(1)
    found = suggested(written(tmp_path, (up, down), (-up + 0.5 * factors(2)[0], down)))
    assert found.method == "ties"
    assert found.figures["energy of the sum"] < 0.3


def test_copies_are_said_to_be_copies(tmp_path: Path):
    pairs = factors(1), factors(1)
    both = suggested(written(tmp_path, *pairs))
    assert (both.method, both.weights) == ("linear", (0.5, 0.5))
    assert "one is enough" in both.reasons[0]
    three = suggested(written(tmp_path, *pairs, factors(2)))
    assert three.weights == (1.0, 0.0, 1.0)
    assert any("2 left out with weight 0" in reason for reason in three.reasons)


def test_an_imbalance_comes_with_the_weights_that_even_it(tmp_path: Path):
    up, down = factors(1)
    paths = written(tmp_path, (4.0 * up, down), factors(2))
    found = suggested(paths)
    assert found.method == "linear"
    ratio = found.figures["largest norm by smallest"]
    assert ratio > 3.0
    assert f"--weights {1 / ratio:.3g},1 " in found.reasons[-1]
    even = compare(paths, weights=[1.0 / ratio, 1.0])
    assert even.adapters[0].norm == pytest.approx(even.adapters[1].norm, rel=1e-9)


def given(cosine, overlap=0.9, conflict=0.5):
    relation = Relation(cosine, 1.0, 1.0, overlap, overlap, 0.05, 0.05, conflict)
    pair = ComparedPair(0, 1, 1, "different", cosine, 1e-6, relation, {})
    found = suggestion([1.0, 1.0], ((1.0, cosine), (cosine, 1.0)), [pair], [1.0, 1.0], ())
    assert found is not None
    assert found.method in methods.methods()
    return found


@pytest.mark.parametrize(
    ("cosine", "overlap", "conflict", "method"),
    [
        (-0.4, 0.9, 0.8, "ties"),
        (-0.05, 0.05, 0.5, "linear"),
        (-0.05, 0.9, 0.5, "tsv"),
        (0.2, 0.9, 0.4, "knots-ties"),
        (0.5, 0.9, 0.1, "linear"),
        (0.8, 0.9, 0.0, "linear"),
    ],
)
def test_every_rule_has_its_range(cosine, overlap, conflict, method):
    assert given(cosine, overlap, conflict).method == method


def test_partial_agreement_is_scaled_to_the_energy_of_a_sum_of_unrelated_ones():
    found = given(0.5, conflict=0.1)
    factor = found.weights[0]
    # ‖w·a + w·b‖² = w²·(2 + 2·0.5), which should be 2.
    assert factor**2 * 3.0 == pytest.approx(2.0)


def test_chance_is_no_overlap():
    relation = Relation(0.0, 1.0, 1.0, 0.8, 0.8, 0.8, 0.8, 0.5)
    pair = ComparedPair(0, 1, 1, "different", 0.0, 1e-6, relation, {})
    found = suggestion([1.0, 1.0], ((1.0, 0.0), (0.0, 1.0)), [pair], [1.0, 1.0], ())
    assert found is not None
    assert found.method == "linear"
    assert found.figures["excess overlap"] == pytest.approx(0.0)


def turned(quarters):
    """Two matrices on the same spaces, one turned against the other in half of its directions."""
    up, down = factors(1, 8)
    columns, rows = torch.linalg.qr(up).Q, torch.linalg.qr(down.T).Q.T
    signs = torch.ones(8)
    signs[: 2 * quarters] = -1.0
    return (columns, rows), (columns * signs, rows)


def cases():
    up, down = factors(1)
    mixed = up + 0.1 * factors(2)[0]
    return {
        "near copies": ([(up, down), (mixed, down)], "linear", (0.5, 0.5), "nearly the same"),
        "unrelated": ([(up, down), factors(2)], "linear", (1.0, 1.0), "nearly orthogonal"),
        "opposites": ([(up, down), (-up, down)], "linear", (1.0, 0.0), "2 of 1 (cosine -1.00)"),
        "a weak opposite": ([(up, down), (-100.0 * up, down)], "linear", (0.0, 1.0), "1 of 2"),
        "an opposite among others": (
            [(up, down), factors(2), (-up, down)],
            "linear",
            (1.0, 1.0, 0.0),
            "3 of 1 (cosine -1.00)",
        ),
        "nearly opposite": (
            [(up, down), (-up + 0.5 * factors(2)[0], down)],
            "ties",
            (1.0, 1.0),
            "against each",
        ),
        "signs in conflict": (turned(1), "linear", None, "agree in part"),
        "evenly turned": (turned(2), "tsv", (1.0, 1.0), "the same directions"),
        "100 times as strong": (
            [(up, down), (100.0 * factors(2)[0], factors(2)[1])],
            "linear",
            (1.0, 1.0),
            "0.0",
        ),
        "a higher rank": ([(up, down), factors(2, 32)], "linear", (1.0, 1.0), "nearly orthogonal"),
        "two alike and one that is not": (
            [(up, down), (mixed, down), factors(3)],
            "linear",
            None,
            "agree in part",
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_what_is_suggested_suits_the_case_and_can_be_run(name, tmp_path: Path):
    pairs, method, weights, words = cases()[name]
    paths = written(tmp_path, *pairs)
    found = suggested(paths)
    assert found.method == method
    assert weights is None or found.weights == weights
    assert any(words in reason for reason in found.reasons), found.reasons
    assert "-0.00" not in " ".join(found.reasons)
    assert found.figures["energy of the sum"] is not None
    asked = ["--method", found.method, "--weights", ",".join(f"{each:.3g}" for each in found.weights)]
    result = invoke("merge", *paths, "-o", tmp_path / "merged", *asked)
    assert result.exit_code == 0, result.stderr
    assert math.sqrt(
        sum(float(each.delta().norm()) ** 2 for each in lt.load(tmp_path / "merged").modules.values())
    )


def test_conflict_counts_where_adapters_are_related():
    # Unrelated adapters conflict in half of their elements, which is nothing to mend.
    relation = Relation(0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.5)
    alike = Relation(0.99, 1.0, 0.1, 1.0, 1.0, 0.0, 0.0, 0.01)
    pairs = [
        ComparedPair(first, second, 1, "different", 0.0, 1e-6, each, {})
        for first, second, each in ((0, 1, alike), (0, 2, relation), (1, 2, relation))
    ]
    cosines = ((1.0, 0.99, 0.0), (0.99, 1.0, 0.0), (0.0, 0.0, 1.0))
    chosen = suggestion([1.0, 1.0, 1.0], cosines, pairs, [1.0, 1.0, 1.0], ())
    assert chosen is not None
    assert chosen.figures["sign conflict"] == 0.01
    assert chosen.method == "linear"


@pytest.mark.parametrize("cosine", [-1e-4, 1e-4, -0.0])
def test_cosines_that_round_to_nothing_have_no_sign(cosine):
    assert "-0.00" not in given(cosine, overlap=0.05).reasons[0]
    assert "mean cosine 0.00" in given(cosine).reasons[0]


def test_partial_opposition_is_not_called_agreement():
    assert (
        given(-0.2, 0.9, 0.6)
        .reasons[0]
        .startswith("They work against each other in part (mean cosine -0.20)")
    )
