"""Inputs that several tests of operations share."""

from __future__ import annotations

from pathlib import Path

import factories as make
import pytest
import torch


@pytest.fixture
def pair(tmp_path: Path) -> tuple[make.Made, make.Made]:
    """Two files of one architecture that differ in rank, alpha, dtype and modules."""
    one = make.kohya(tmp_path / "one.safetensors", "sdxl", seed=1, rank=4, alpha=2.0)
    two = make.kohya(
        tmp_path / "two.safetensors",
        "sdxl",
        seed=2,
        rank=3,
        alpha=5.0,
        dtype=torch.float16,
        only=["attn", "te1", "output_blocks", "in_layers"],
        ranks={"attn2": 7},
    )
    return one, two
