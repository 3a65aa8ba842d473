"""The leading singular vectors exactly, by the Gram matrix of the smaller side or by a full decomposition.

G = DᵀD is added up in float64 over row tiles, so that no more than one tile and G are held beside D. The top part of
its eigenvectors V is refined by one product: D·V = U·Σ, orthogonalised again, whose singular values have none of the
error that squaring made. The error within V is of the second order for what is lost, about eps·‖D‖². The full
decomposition in float64 takes its place where that matters or costs nothing: where less than 10⁻¹¹ of ‖D‖² is lost
(singular values around sqrt(eps)·σ₁ are wanted, or the matrix has no more than the rank), and on small matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from loratools.maths._approximation import Approximation, polished
from loratools.maths.lowrank import COMPUTE, Svd, dense_svd
from loratools.maths.rank import Float64, Rule, needed

_SMALL = 32
_TILE_ELEMENTS = 1 << 18
_RESOLVED = 1e-11


class _Top(NamedTuple):
    """What the Gram matrix says: its leading eigenvectors (in, k), and the singular values known, descending."""

    vectors: torch.Tensor
    values: Float64


def decompose_exactly(matrix: torch.Tensor, energy: float, rule: Rule, noise: float) -> Approximation:
    """The best approximation of the rank that a rule asks for.

    Args:
        matrix: (out, in) float32 with out ≥ in, finite, not zero.
        energy: ‖D‖_F².
        rule: Of the rank.
        noise: The Frobenius norm below which what is left means nothing.
    """
    if matrix.shape[1] > _SMALL:
        found = _by_gram(matrix, energy, rule, noise)
        if found is not None:
            return found
    return _whole(matrix, rule, noise)


def _by_gram(matrix: torch.Tensor, energy: float, rule: Rule, noise: float) -> Approximation | None:
    """The approximation from DᵀD, or None where squaring lost what matters."""
    gram = matrix.new_zeros(matrix.shape[1], matrix.shape[1], dtype=COMPUTE)
    for tile in _tiles(matrix):
        gram.addmm_(tile.T, tile)
    top = _top(gram, energy, rule)
    images = torch.cat([tile @ top.vectors for tile in _tiles(matrix)])
    u, sigma, vh = polished(images, top.vectors)
    squares = sigma.square().cpu().numpy()
    lost = energy - float(squares.sum())
    rank = int(squares.size)
    if lost < max(_RESOLVED * energy, noise**2):
        lost = _rest(matrix, images, top.vectors)
        if lost <= noise**2:
            tails = lost + np.append(np.cumsum(squares[::-1])[::-1], 0.0)
            rank = int(np.argmax(tails <= noise**2))
            lost = float(tails[rank])
        elif lost < _RESOLVED * energy:
            return None
    values = np.maximum(top.values, 0.0)
    values[: squares.size] = sigma.cpu().numpy()
    return Approximation(u[:, :rank], sigma[:rank], vh[:rank], lost, 0.0, values)


def _whole(matrix: torch.Tensor, rule: Rule, noise: float) -> Approximation:
    found: Svd = dense_svd(matrix.to(COMPUTE))
    sigma = found.sigma.cpu().numpy()
    sigma = np.where(sigma > sigma[0] * max(matrix.shape) * np.finfo(np.float64).eps, sigma, 0.0)
    squares = np.square(sigma)
    tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    wanted = needed(rule, sigma, float(tails[0]), int(sigma.size))
    rank = min(int(sigma.size) if wanted is None else wanted, int(np.argmax(tails <= noise**2)))
    return Approximation(
        found.u[:, :rank], found.sigma[:rank], found.vh[:rank], float(tails[rank]), 0.0, sigma
    )


def _top(gram: torch.Tensor, energy: float, rule: Rule) -> _Top:
    """As many leading eigenvectors of a Gram matrix as a rule asks for."""
    size = int(gram.shape[0])
    if rule.kind != "rank" or gram.device.type != "cpu":
        squares, vectors = _eigh(gram)
        values = squares.clamp_min(0.0).sqrt().flip(0).cpu().numpy()
        wanted = needed(rule, values, energy, size)
        return _Top(vectors.flip(1)[:, : size if wanted is None else wanted], values)
    import scipy.linalg

    wanted = min(size, max(int(rule.value), rule.least), size if rule.most is None else rule.most)
    try:
        found, columns = scipy.linalg.eigh(
            gram.numpy(), subset_by_index=(size - wanted, size - 1), check_finite=False
        )
    except scipy.linalg.LinAlgError:
        squares, vectors = _eigh(gram)
        found, columns = squares[-wanted:].numpy(), vectors[:, -wanted:].numpy()
    values = np.sqrt(np.maximum(found[::-1], 0.0))
    return _Top(torch.from_numpy(columns[:, ::-1].copy()), values)


def _eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All eigenvalues of a Gram matrix, ascending, and the eigenvectors."""
    try:
        squares, vectors = torch.linalg.eigh(gram)
    except RuntimeError:
        # Divide and conquer gives up on rare matrices that the decomposition by QR iteration still solves.
        found = dense_svd(gram)
        return found.sigma.flip(0), found.u.flip(1)
    return squares, vectors


def _rest(matrix: torch.Tensor, images: torch.Tensor, vectors: torch.Tensor) -> float:
    """‖D − images·vectorsᵀ‖_F², without the difference of two large sums."""
    total, start = 0.0, 0
    for tile in _tiles(matrix):
        rest = torch.addmm(tile, images[start : start + tile.shape[0]], vectors.T, alpha=-1.0)
        total += float(torch.linalg.vector_norm(rest)) ** 2
        start += tile.shape[0]
    return total


def _tiles(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows in float64, a few MiB at a time."""
    height = max(64, _TILE_ELEMENTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], height):
        yield matrix[start : start + height].to(COMPUTE)
