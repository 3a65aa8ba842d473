"""The same merge on a GPU and on the CPU: ΔW agrees to float64's rounding, before the store dtype."""

from __future__ import annotations

import pytest
import torch

from loratools import methods
from loratools.maths.lowrank import Factors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def parts(device: str, count: int = 3) -> list[methods.Part]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for rank, weight in zip((8, 16, 4), (0.7, -0.4, 1.2), strict=True):
        up = torch.randn(320, rank, generator=generator, dtype=torch.float64)
        down = torch.randn(rank, 768, generator=generator, dtype=torch.float64)
        found.append(methods.Part(Factors(up.to(device), down.to(device)), weight))
    return found[:count]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("linear", {"rank": 8}),
        ("concat", {}),
        ("ties", {"rank": 320, "density": 0.3}),
        ("ties", {"rank": 24, "density": 0.3}),
    ],
)
def test_gpu_equals_cpu(method: str, options: dict[str, float]) -> None:
    chosen = methods.methods()[method]
    settings = methods.Options(**options)
    there = chosen.combine(parts("cuda"), settings)
    here = chosen.combine(parts("cpu"), settings)
    assert there.factors.up.device.type == "cuda"
    expected = here.factors.delta()
    error = (there.factors.delta().cpu() - expected).norm() / expected.norm()
    assert error < 1e-9
    assert there.energy == pytest.approx(here.energy, abs=1e-9)
