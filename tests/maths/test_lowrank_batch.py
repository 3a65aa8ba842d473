"""Stacks of low-rank matrices: what comes of each is what comes of it alone."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import NonFiniteError, OptionError, ShapeError
from loratools.maths import lowrank_batch
from loratools.maths.lowrank import COMPUTE, Compressed, Factors, compress, stack
from loratools.maths.lowrank_batch import Stack, compress_batch, singular_values_batch, stacked
from loratools.maths.spectrum import singular_values

SHAPES = [(30, 40, 5), (5, 40, 5), (40, 3, 5), (2, 3, 5), (7, 9, 1), (60, 50, 40)]


def matrices(out: int, width: int, rank: int, seed: int = 0, count: int = 7) -> Stack:
    """Ordinary ones, and every way of being none: zero, repeated, empty and nearly dependent columns, huge, tiny."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(count, out, rank, generator=generator, dtype=COMPUTE)
    down = torch.randn(count, rank, width, generator=generator, dtype=COMPUTE)
    up[1] = 0.0
    up[2, :, -1] = up[2, :, 0]
    down[3, -1] = 0.0
    up[4, :, -1] = up[4, :, 0] * (1.0 + 1e-9)
    up[5] *= 1e60
    down[6] *= 1e-60
    return Stack(up, down)


def agree(found: Compressed, wanted: Compressed) -> None:
    size = float(wanted.sigma[0])
    assert found.factors.rank == wanted.factors.rank
    assert found.energy == pytest.approx(wanted.energy, abs=1e-12)
    assert float((found.sigma - wanted.sigma).abs().max()) <= 1e-12 * size
    difference = found.factors.delta() - wanted.factors.delta()
    assert float(difference.norm()) <= 1e-10 * size
    for one, other in ((found.factors.up, wanted.factors.up), (found.factors.down, wanted.factors.down)):
        assert float(one.norm()) == pytest.approx(float(other.norm()), rel=1e-6)


@pytest.mark.parametrize("rank", [None, 1, 3, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stack_gives_what_its_matrices_give(shape: tuple[int, int, int], rank: int | None) -> None:
    given = matrices(*shape)
    found = compress_batch(given, [rank] * 7)
    for up, down, each in zip(*given, found, strict=True):
        agree(each, compress(Factors(up, down), rank))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_matrix_has_a_rank_of_its_own(shape: tuple[int, int, int]) -> None:
    given, ranks = matrices(*shape, seed=1), [1, None, 2, 5, 3, None, 4]
    found = compress_batch(given, ranks)
    for up, down, rank, each in zip(*given, ranks, found, strict=True):
        agree(each, compress(Factors(up, down), rank))


@pytest.mark.parametrize("shape", SHAPES)
def test_values_alone(shape: tuple[int, int, int]) -> None:
    given = matrices(*shape, seed=2)
    for up, down, found in zip(*given, singular_values_batch(given), strict=True):
        wanted = singular_values(Factors(up, down))
        assert found.real == wanted.real
        assert float((found.sigma - wanted.sigma).abs().max()) <= 1e-12 * float(wanted.sigma[0])


def test_a_result_does_not_depend_on_the_others_of_its_stack() -> None:
    given = matrices(30, 40, 5)
    whole = compress_batch(given, [3] * 7)
    for index in range(7):
        alone = compress_batch(Stack(given.up[index, None], given.down[index, None]), [3])
        agree(whole[index], alone[0])


def test_half_precision_is_widened() -> None:
    given = matrices(30, 40, 5)
    half = Stack(given.up[:1].half(), given.down[:1].half())
    agree(compress_batch(half, [2])[0], compress(Factors(half.up[0], half.down[0]), 2))


@pytest.mark.parametrize("place", ["up", "down"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_that_is_not_finite_is_refused(place: str, value: float) -> None:
    given = matrices(30, 40, 5)
    getattr(given, place)[0, 0, 0] = value
    with pytest.raises(NonFiniteError):
        compress_batch(given, [2] * 7)
    with pytest.raises(NonFiniteError):
        singular_values_batch(given)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(OptionError, match="rank 0"):
        compress_batch(matrices(30, 40, 5), [1, 1, 1, 0, 1, 1, 1])


def test_a_decomposition_that_does_not_converge_together_is_done_singly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, original = matrices(30, 40, 5), torch.linalg.svd

    def fails(matrix: torch.Tensor, **options: bool) -> object:
        if matrix.dim() > 2:
            raise RuntimeError("linalg.svd: the algorithm failed to converge")
        return original(matrix, **options)

    wanted = compress_batch(given, [3] * 7)
    monkeypatch.setattr(torch.linalg, "svd", fails)
    for one, other in zip(compress_batch(given, [3] * 7), wanted, strict=True):
        agree(one, other)


def test_memory_that_does_not_suffice_is_not_taken_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> object:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lowrank_batch.torch.linalg, "svd", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        compress_batch(matrices(30, 40, 5), [3] * 7)


def test_sums_of_several_parts() -> None:
    parts = [matrices(30, 40, rank, seed=rank) for rank in (2, 3)]
    batch = [[Factors(each.up[i], each.down[i]) for each in parts] for i in range(7)]
    weights = [[0.7, -0.4], [1.0, 1.0], [0.0, 2.0], [-1.0, -1.0], [1e-30, 1.0], [1.0, 0.5], [3.0, 2.0]]
    found = stacked(batch, weights)
    for index, (factors, own) in enumerate(zip(batch, weights, strict=True)):
        wanted = stack(factors, own)
        torch.testing.assert_close(found.up[index], wanted.up, rtol=1e-15, atol=0.0)
        torch.testing.assert_close(found.down[index], wanted.down, rtol=1e-15, atol=0.0)


def test_sums_that_are_not_alike_are_refused() -> None:
    one, other = matrices(30, 40, 2), matrices(30, 40, 3)
    pairs = [[Factors(each.up[0], each.down[0])] for each in (one, other)]
    with pytest.raises(ShapeError, match="2 different make-ups"):
        stacked(pairs, [[1.0], [1.0]])
