"""Decompositions on a GPU equal those on the CPU, singly and in batches."""

from __future__ import annotations

import pytest
import torch

from loratools.maths.rank import Rule
from loratools.maths.svd import decompose, decompose_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def stack(count, out, width):
    generator = torch.Generator().manual_seed(4)
    low = torch.randn(count, out, 12, generator=generator) @ torch.randn(
        count, 12, width, generator=generator
    )
    noise = torch.randn(count, out, width, generator=generator)
    return low + torch.linspace(0.01, 2.0, count)[:, None, None] * noise


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("rule", [Rule("rank", 16), Rule("energy", 0.5)])
def test_a_gpu_gives_what_the_cpu_gives(method, rule):
    matrices = stack(4, 500, 400)
    together = decompose_batch(matrices.cuda(), rule, method=method)
    for matrix, one in zip(matrices, together, strict=True):
        single, cpu = decompose(matrix.cuda(), rule, method=method), decompose(matrix, rule, method=method)
        for found in (one, single):
            assert found.u.device.type == "cuda"
            assert found.sigma.numel() == cpu.sigma.numel()
            assert found.lost == pytest.approx(cpu.lost, rel=2e-3)
            torch.testing.assert_close(found.sigma.cpu(), cpu.sigma, rtol=1e-2, atol=0.0)
            product = found.u * found.sigma @ found.vh
            lost = float((matrix.cuda().double() - product).square().sum())
            assert lost == pytest.approx(found.lost, rel=2e-3)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_the_optimum_is_met_on_a_gpu(method):
    matrices = stack(3, 640, 640)
    for matrix, found in zip(
        matrices, decompose_batch(matrices.cuda(), Rule("rank", 20), method=method), strict=True
    ):
        sigma = torch.linalg.svdvals(matrix.double())
        optimum = float(sigma[20:].square().sum())
        assert found.lost <= optimum * 1.001**2
        assert found.lost - found.gap <= optimum * (1 + 1e-4)
