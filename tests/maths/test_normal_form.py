"""Stacks of small products: folding, padding, and what tells two ΔW apart."""

from __future__ import annotations

import pytest
import torch

from loratools.maths import normal_form
from loratools.maths.normal_form import Stacked


def stacked(rank: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> Stacked:
    generator = torch.Generator().manual_seed(seed)
    return Stacked(
        torch.randn(4, 6, rank, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(4, rank, 6, generator=generator, dtype=torch.float64).to(dtype),
    )


def rotated(given: Stacked) -> Stacked:
    generator = torch.Generator().manual_seed(9)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    return Stacked(given.up @ turn, turn.T @ given.down)


def test_a_scale_of_a_power_of_two_rounds_nothing():
    given = stacked(dtype=torch.bfloat16)
    found = normal_form.folded(given, [2.0, -0.5, 8.0, 1.0], torch.bfloat16)
    for scale, up, down, up2, down2 in zip(
        (2.0, -0.5, 8.0, 1.0), given.up, given.down, found.up, found.down, strict=True
    ):
        assert torch.equal(up2.double() @ down2.double(), scale * (up.double() @ down.double()))


def test_another_scale_is_rounded_once():
    given = stacked(dtype=torch.float16)
    found = normal_form.folded(given, [3.0, 0.7, 0.0, 1.0], torch.float16)
    assert torch.equal(found.up[0].double(), (given.up[0].double() * 0.75 * 2.0).half().double())
    assert torch.equal(found.down[0], given.down[0] * 2)
    assert not found.up[2].any()


def test_padding_adds_zeros_alone():
    given = stacked()
    found = normal_form.padded(given, 8)
    assert found.up.shape == (4, 6, 8)
    assert found.down.shape == (4, 8, 6)
    assert torch.equal(found.up[:, :, :3], given.up)
    assert not found.up[:, :, 3:].any()
    assert not found.down[:, 3:].any()
    assert normal_form.padded(given, 3) is given


def test_a_sketch_is_of_the_product_and_not_of_its_factors():
    given = stacked()
    same = normal_form.padded(rotated(given), 5)
    torch.testing.assert_close(
        normal_form.sketches(given), normal_form.sketches(same), rtol=1e-10, atol=1e-10
    )
    turned = Stacked(given.down.transpose(1, 2), given.up.transpose(1, 2))
    assert not torch.allclose(normal_form.sketches(given), normal_form.sketches(turned), rtol=0.1)
    dense = given.up @ given.down
    left, right = normal_form.probes(12, 6), normal_form.probes(13, 6)
    expected = torch.einsum("op,noi,ip->np", left, dense, right)
    torch.testing.assert_close(normal_form.sketches(given), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sketch_shows_what_is_not_finite(value):
    given = stacked()
    given.down[2, 0, 1] = value
    assert normal_form.sketches(given).isfinite().all(dim=1).tolist() == [True, True, False, True]


def test_differences_do_not_cancel():
    given = stacked()
    away, norms = normal_form.differences(given, rotated(given))
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(given.up @ given.down))
    assert float((away / norms).max()) < 1e-14
    other = Stacked(given.up * (1 + 1e-9), given.down)
    away, norms = normal_form.differences(given, normal_form.padded(other, 4))
    torch.testing.assert_close(away / norms, torch.full((4,), 1e-9, dtype=torch.float64), rtol=1e-5, atol=0)


def test_a_projection_keeps_norms_and_is_linear():
    generator = torch.Generator().manual_seed(5)
    for length in (8, 1000, 2**15 + 3):  # the last in more than one part
        sketch = torch.randn(length, generator=generator, dtype=torch.float64)
        found = normal_form.projected(sketch, 64)
        assert 0.6 < float(found.norm() / sketch.norm()) < 1.6
        torch.testing.assert_close(normal_form.projected(-3 * sketch, 64), -3 * found)
    assert not normal_form.projected(torch.zeros(8, dtype=torch.float64), 64).any()
