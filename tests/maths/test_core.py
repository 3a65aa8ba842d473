"""Products of factors in common bases, against the dense matrices."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import NonFiniteError
from loratools.maths.core import aligned, core_of, inner_products
from loratools.maths.lowrank import COMPUTE, Factors

WEIGHTS = [1.0, -0.5, 2.0]


def made(
    shape: tuple[int, int] = (14, 11), ranks: tuple[int, ...] = (2, 3, 1), seed: int = 0
) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)
    out, width = shape
    return [
        Factors(
            torch.randn(out, rank, generator=generator, dtype=COMPUTE),
            torch.randn(rank, width, generator=generator, dtype=COMPUTE),
        )
        for rank in ranks
    ]


@pytest.mark.parametrize("ranks", [(2, 3, 1), (9, 8, 7), (14, 14, 14)])
@pytest.mark.parametrize("build", [core_of, aligned])
def test_cores_are_the_matrices(build, ranks: tuple[int, ...]) -> None:
    parts = made(ranks=ranks)
    core = build(parts, WEIGHTS)
    for part, weight, small in zip(parts, WEIGHTS, core.parts, strict=True):
        torch.testing.assert_close(core.left @ small @ core.right.T, weight * part.delta())
        torch.testing.assert_close(core.factors(small).delta(), weight * part.delta())
    assert core.left.shape[1] == min(14, sum(ranks))
    assert core.right.shape[1] == min(11, sum(ranks))
    torch.testing.assert_close(core.left.T @ core.left, torch.eye(core.left.shape[1], dtype=COMPUTE))


def test_aligned_bases_do_not_depend_on_order_or_balance() -> None:
    parts = made()
    core = aligned(parts, WEIGHTS)
    uneven = [Factors(part.up * 8, part.down / 8) for part in parts]
    again = aligned(uneven[::-1], WEIGHTS[::-1])
    for small, other in zip(core.parts, again.parts[::-1], strict=True):
        torch.testing.assert_close(small, other)


def test_inner_products() -> None:
    parts = made()
    dense = torch.stack(
        [weight * part.delta().flatten() for part, weight in zip(parts, WEIGHTS, strict=True)]
    )
    torch.testing.assert_close(inner_products(parts, WEIGHTS), dense @ dense.T)


def test_nan_is_refused() -> None:
    parts = made()
    parts[0].up[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        core_of(parts, WEIGHTS)
