"""Leading singular vectors by a Gram matrix equal those of the full decomposition."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import NonFiniteError
from loratools.maths.leading import leading_svd, tall_svd
from loratools.maths.lowrank import COMPUTE


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=COMPUTE, generator=torch.Generator().manual_seed(seed))


def close(found, truth):
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10 * float(truth.abs().max()))


def product(found):
    return found.u * found.sigma @ found.vh


def with_values(sigma, shape=(90, 60)):
    u, v = (torch.linalg.qr(gaussian(length, len(sigma), seed=length)).Q for length in shape)
    return u * torch.as_tensor(sigma, dtype=COMPUTE) @ v.T


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (70, 70), (20, 30)])
@pytest.mark.parametrize("rank", [1, 12, 59, 200])
@pytest.mark.parametrize("scale", [1.0, 1e-158, 1e-140, 1e140])
def test_it_is_the_truncated_decomposition(shape, rank, scale):
    matrix = gaussian(*shape)
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = leading_svd(scale * matrix, rank)
    kept = min(rank, *shape)
    close(found.sigma / scale, sigma[:kept])
    close(product(found) / scale, u[:, :kept] * sigma[:kept] @ vh[:kept])
    for columns in (found.u, found.vh.T):
        close(columns.T @ columns, torch.eye(kept, dtype=COMPUTE))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rank", [3, 5, 8, 20])
def test_small_singular_values_are_not_lost_by_squaring(turned, rank):
    matrix = with_values([1.0, 1e-2, 1e-5, 1e-9, 1e-12])
    sigma = torch.linalg.svdvals(matrix)
    found = leading_svd(matrix.T if turned else matrix, rank)
    torch.testing.assert_close(found.sigma[:5], sigma[: min(rank, 5)], rtol=0, atol=1e-15)
    lost = float(torch.linalg.matrix_norm((matrix.T if turned else matrix) - product(found)))
    assert lost <= float(sigma[rank:].square().sum()) ** 0.5 * (1 + 1e-6) + 1e-14


def test_nothing_has_no_strength():
    assert leading_svd(torch.zeros(50, 40, dtype=COMPUTE), 3).sigma.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("decompose", [lambda matrix: leading_svd(matrix, 3), tall_svd])
def test_what_is_not_finite_is_refused(value, decompose):
    matrix = gaussian(50, 40)
    matrix[7, 9] = value
    with pytest.raises(NonFiniteError):
        decompose(matrix)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (9, 9), (5, 1)])
def test_tall_matrices_are_decomposed_by_a_triangle(shape):
    matrix = gaussian(*shape)
    found = tall_svd(matrix)
    close(product(found), matrix)
    close(found.sigma, torch.linalg.svdvals(matrix))
    close(found.u.T @ found.u, torch.eye(min(shape), dtype=COMPUTE))
    close(found.vh @ found.vh.T, torch.eye(min(shape), dtype=COMPUTE))
