"""Rows of fused weights: taking and placing them loses nothing."""

from __future__ import annotations

from pathlib import Path

import factories as make
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.errors import ArchitectureError, ShapeError
from loratools.model import Rows
from loratools.ops.align import align, common_arch, take_rows

SWAPPED = Rows(((1, 2), (0, 1)), 2)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, list[Rows]]:
    """A weight cut into pieces of unequal shares: how many shares, and the pieces in order."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    of, position, pieces = sum(sizes), 0, []
    for size in sizes:
        pieces.append(Rows(((position, position + size),), of))
        position += size
    return of, pieces


@given(cuts(), st.integers(1, 3), st.integers(1, 3), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_splitting_then_fusing_gives_the_first_back(
    cut: tuple[int, list[Rows]], unit: int, rank: int, rng
) -> None:
    of, pieces = cut
    up = torch.tensor([[rng.random() for _ in range(rank)] for _ in range(of * unit)])
    parts = [take_rows(up, None, piece, "w") for piece in pieces]
    assert torch.equal(torch.cat(parts), up)
    placed = [take_rows(part, piece, None, "w") for part, piece in zip(parts, pieces, strict=True)]
    assert all(part.shape == up.shape for part in placed)
    assert torch.equal(sum(placed), up)


@given(st.integers(1, 5), st.integers(1, 3))
def test_swapping_the_halves_twice_is_the_identity(half: int, rank: int) -> None:
    up = torch.arange(2 * half * rank, dtype=torch.float64).reshape(2 * half, rank)
    once = take_rows(up, None, SWAPPED, "w")
    assert torch.equal(once, torch.cat([up[half:], up[:half]]))
    assert torch.equal(take_rows(once, SWAPPED, None, "w"), up)
    assert torch.equal(take_rows(once, SWAPPED, SWAPPED, "w"), once)


def test_rows_in_shares_of_another_count() -> None:
    up = torch.arange(12.0).reshape(12, 1)
    half = take_rows(up, None, Rows(((0, 1),), 2), "w")
    assert torch.equal(take_rows(half, Rows(((0, 1),), 2), Rows(((1, 2),), 3), "w")[:2], up[4:6])


def test_rows_that_are_not_there_are_zero() -> None:
    up = torch.ones(2, 3)
    placed = take_rows(up, Rows(((1, 2),), 3), None, "w")
    assert placed.tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2 + [[0.0] * 3] * 2


def test_a_height_that_cannot_be_parted_is_named() -> None:
    with pytest.raises(ShapeError, match=r"blocks\.0\.qkv: 7 rows"):
        take_rows(torch.ones(7, 2), None, Rows(((0, 1),), 3), "blocks.0.qkv")


@pytest.mark.parametrize("dialect", ["native", "diffusers", "kohya"])
def test_flux_is_aligned_in_the_grain_of_the_result(dialect: str, tmp_path: Path) -> None:
    fused = lt.load(make.kohya(tmp_path / "a.safetensors", "flux").path)
    split = lt.load(make.diffusers(tmp_path / "b.safetensors", "flux").path)
    targets = align([fused, split], "flux", dialect)
    weights = make.FLUX_SPLIT if dialect == "diffusers" else make.FLUX_FUSED
    assert {str(target) for target in targets} == {weight.target for weight in weights}
    for target, contributions in targets.items():
        sources = sorted({each.source for each in contributions})
        assert sources == [0, 1], target


def test_architectures_that_differ_are_named(tmp_path: Path) -> None:
    one = lt.load(make.kohya(tmp_path / "a.safetensors", "sd15").path)
    other = lt.load(make.kohya(tmp_path / "b.safetensors", "sdxl").path)
    with pytest.raises(ArchitectureError, match=r"Stable Diffusion 1.*Stable Diffusion XL"):
        common_arch([one, other])
    assert common_arch([one, one]) == "sd15"
