"""What float32 has rounded away in a merge is not extracted; what may be training is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.ops.extract import extract

NAME = "model.layers.0.self_attn.q_proj.weight"


def sigma_of(change: float, dtype: torch.dtype, folder: Path) -> int:
    """The rank that is extracted, of 16 asked for, where a product of rank 5 was merged."""
    generator = torch.Generator().manual_seed(0)
    base, up, down = (torch.randn(*size, generator=generator) for size in ((300, 280), (300, 5), (5, 280)))
    tuned = base + change * up @ down
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, values in zip(paths, (base, tuned), strict=True):
        save_file({NAME: values.to(dtype).contiguous()}, path)
    _, report = extract(*paths, rank=16)
    return int(report.modules[0].rank)


@pytest.mark.parametrize(
    ("change", "dtype", "rank"),
    [
        (1e-2, torch.float32, 5),
        (1e-7, torch.float32, 16),  # no larger than the rounding: nothing tells the one from the other
        (1e-2, torch.float16, 16),
        (1e-2, torch.bfloat16, 16),
    ],
)
def test_the_rank_of_a_merged_product(change: float, dtype: torch.dtype, rank: int, tmp_path: Path) -> None:
    assert sigma_of(change, dtype, tmp_path) == rank
