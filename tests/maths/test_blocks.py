"""What a block adds to a basis is orthonormal and explains the block, however little is new in it."""

from __future__ import annotations

import pytest
import torch

from loratools.maths._blocks import Rows, new_directions


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def basis_of(count, length):
    return torch.linalg.qr(gaussian(length, count)).Q.mT[None].contiguous()


def blocks(basis):
    length = basis.shape[2]
    graded = torch.logspace(0, -6, 8)[:, None] * gaussian(8, length, seed=1)
    return {
        "all new": gaussian(8, length, seed=1),
        "graded": graded,
        "nearly nothing new": gaussian(8, basis.shape[1], seed=2) @ basis[0]
        + 1e-4 * gaussian(8, length, seed=3),
        "dependent": gaussian(8, 3, seed=2) @ gaussian(3, length, seed=3),
        "zero": torch.zeros(8, length),
    }


@pytest.mark.parametrize("name", sorted(blocks(basis_of(4, 9))))
def test_new_directions(name):
    basis = basis_of(24, 200)
    block = blocks(basis)[name][None]
    found, coupling = new_directions(block, basis)
    assert (found.dtype, coupling.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(found[0] @ found[0].mT, torch.eye(8), rtol=0, atol=2e-6)
    assert float((found @ basis.mT).abs().max()) < 2e-6
    inside = (block @ basis.mT) @ basis
    explained = inside + (coupling.mT @ found.double()).float()
    torch.testing.assert_close(explained, block, rtol=0, atol=3e-6 * float(block.norm()) + 1e-12)


def test_rows_grow_and_are_chosen():
    rows = Rows(torch.empty(3, 5, 4))
    first, second = gaussian(3, 2, 4), gaussian(3, 1, 4, seed=1)
    rows.append(first)
    rows.append(second)
    assert torch.equal(rows.held, torch.cat([first, second], 1))
    kept = rows.chosen(torch.tensor([2, 0]))
    kept.append(gaussian(2, 2, 4, seed=2))
    assert torch.equal(kept.held[:, :3], rows.held[[2, 0]])
