"""Draws that belong to a place."""

from __future__ import annotations

import torch

from loratools.maths.draws import key_of, uniform


def test_tiles_are_parts_of_the_whole() -> None:
    whole = uniform(key_of(7, "module", 1), 0, (100, 37))
    tiles = [uniform(key_of(7, "module", 1), start, (25, 37)) for start in range(0, 100, 25)]
    assert torch.equal(torch.cat(tiles), whole)


def test_they_are_uniform_and_independent() -> None:
    found = uniform(key_of(0, "w", 0), 0, (512, 512))
    assert float(found.min()) >= 0.0
    assert float(found.max()) < 1.0
    # Standard deviations of the mean of n uniform numbers are 1 / sqrt(12 n).
    limit = 5 / (12 * found.numel()) ** 0.5
    assert abs(float(found.mean()) - 0.5) < limit
    for other in (found.roll(1, 0), found.roll(1, 1), uniform(key_of(0, "w", 1), 0, (512, 512)), found.T):
        product = (found - 0.5) * (other - 0.5)
        assert abs(float(product.mean())) < 5 / 12 / 512
    counts = torch.histc(found, 64, 0.0, 1.0)
    expected = found.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 6 * (2 * 63) ** 0.5


def test_keys_differ() -> None:
    keys = {key_of(seed, name, source) for seed in range(5) for name in ("a", "b") for source in range(5)}
    assert len(keys) == 50
    assert key_of(1, "23") != key_of(12, "3")
