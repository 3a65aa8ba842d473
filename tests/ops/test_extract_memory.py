"""What an extraction is said to hold, and that a tensor that is only measured is not held."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from loratools.io.base import keys_of, load
from loratools.maths.rank import Rule
from loratools.ops._changes import Piece
from loratools.ops._extract_difference import difference, distance
from loratools.ops._extract_memory import memory_of, most_kept
from loratools.ops._extract_tensor import FACTORS, NORM, Job

OUT, WIDTH = 4096, 512
SIZE = OUT * WIDTH
MIB = 1 << 20


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("sides")
    base = torch.randn(OUT, WIDTH, dtype=torch.bfloat16)
    sides = {"base": base, "tuned": base + torch.randn_like(base)}
    for name, values in sides.items():
        save_file({"w": values}, folder / f"{name}.safetensors")
    spans = ((0, OUT, 0),)
    pieces = [Piece(keys_of(folder / f"{name}.safetensors").parts[""]["w"], spans) for name in sides]
    return Job(0, "w", pieces[0], (pieces[1],), (OUT, WIDTH), OUT, FACTORS, Rule("rank", 16), "randomized")


def test_a_search_holds_the_difference_and_little_more(job):
    assert 4 * SIZE < memory_of(job) < 4 * SIZE + 20 * MIB


def test_what_is_only_measured_holds_nothing_of_the_tensors_size(job):
    wide = job._replace(shape=(OUT * 100, WIDTH), task=NORM)
    assert memory_of(job._replace(task=NORM)) < 16 * MIB
    assert memory_of(wide) > 400 * SIZE  # its sides have other shapes: it is put together


def test_the_exact_way_holds_squares_of_the_smaller_side(job):
    exact = job._replace(method="exact")
    assert memory_of(exact) - 4 * SIZE >= 3 * 8 * WIDTH**2
    unknown = exact._replace(rule=Rule("energy", 0.9))
    assert most_kept(unknown) == WIDTH
    assert most_kept(unknown._replace(rule=Rule("energy", 0.9, most=7))) == 7
    assert memory_of(unknown) > memory_of(exact)


def test_distances_are_the_norms_of_differences(job):
    found = difference(job)
    assert found is not None
    assert distance(job) == found.norm > 0
    assert distance(job._replace(tuned=(job.base,))) == 0.0


def test_a_tuned_side_in_one_tensor_and_in_two_gives_the_same(job, tmp_path):
    plain = difference(job)
    half = OUT // 2
    (own,) = job.tuned
    parts = [own._replace(spans=((start, start + half, start),)) for start in (0, half)]
    together = difference(job._replace(tuned=tuple(parts)))
    turned = []
    for number, side in enumerate((job.base, own)):
        path = tmp_path / f"{number}.safetensors"
        save_file({"w": load(side.weight).t().contiguous()}, path)
        turned.append(Piece(keys_of(path).parts[""]["w"], side.spans, turned=True))
    across = difference(job._replace(base=turned[0], tuned=(turned[1],)))
    assert plain is not None
    assert together is not None
    assert across is not None
    assert torch.equal(plain.matrix, together.matrix)
    assert torch.equal(plain.matrix, across.matrix)
