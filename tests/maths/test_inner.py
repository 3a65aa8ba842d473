"""Inner products from factors equal those of the dense matrices."""

from __future__ import annotations

import torch

from loratools.maths.inner import inner_products
from loratools.maths.lowrank import COMPUTE, Factors

WEIGHTS = [1.0, -0.5, 2.0]


def test_inner_products() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        Factors(
            torch.randn(14, rank, generator=generator, dtype=COMPUTE),
            torch.randn(rank, 11, generator=generator, dtype=COMPUTE),
        )
        for rank in (2, 3, 1)
    ]
    dense = torch.stack(
        [weight * part.delta().flatten() for part, weight in zip(parts, WEIGHTS, strict=True)]
    )
    torch.testing.assert_close(inner_products(parts, WEIGHTS), dense @ dense.T)
