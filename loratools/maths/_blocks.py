"""Rows of vectors that grow block by block, and the orthonormal directions that a block adds to them."""

from __future__ import annotations

import torch

COMPUTE = torch.float64

# Of the diagonal of a Cholesky factor: below this ratio the Gram matrix no longer resolves the smallest direction.
_RESOLVED = 1e-5
# Frobenius condition of a triangle (its width at least) up to which its inverse in float32 leaves rows orthonormal.
_WELL = 500.0
# Of a row's square: what a projection must leave for its rounding errors along the basis to be small.
_LEFT = 0.1


class Rows:
    """Vectors per matrix of a batch, in memory that is set aside for as many as there may be.

    Args:
        space: (n, most, length).
        count: How many of each are held already.
    """

    def __init__(self, space: torch.Tensor, count: int = 0) -> None:
        self._space, self._count = space, count

    @property
    def held(self) -> torch.Tensor:
        """(n, count, length), without a copy."""
        return self._space[:, : self._count]

    def append(self, block: torch.Tensor) -> None:
        """Hold the vectors of a block (n, width, length) too."""
        end = self._count + int(block.shape[1])
        self._space[:, self._count : end] = block
        self._count = end

    def chosen(self, index: torch.Tensor) -> Rows:
        """Those of some of the matrices alone."""
        space = self._space.new_empty(len(index), *self._space.shape[1:])
        space[:, : self._count] = self.held[index]
        return Rows(space, self._count)


def new_directions(image: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows of what a block adds to a basis, and their coefficients in it.

    Args:
        image: (n, width, length) float32.
        basis: (n, b, length) float32, orthonormal rows.

    Returns:
        X (n, width, length) float32, and β (n, width, width) float64, such that image = C·basis + βᵀ·X for some C.
    """
    first, outer, well = _orthonormal(_beside(image, basis))
    left = outer.square().sum(-1)
    if well and bool((left > _LEFT * image.to(COMPUTE).square().sum(-1)).all()):
        return first, outer.mT
    # Twice: where little is new, the first pass leaves rounding errors along the basis.
    second, inner, _ = _orthonormal(_beside(first, basis))
    return second, (outer @ inner).mT


def _beside(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Rows less what of them lies along a basis."""
    return torch.baddbmm(rows, rows @ basis.mT, basis, alpha=-1.0)


def _orthonormal(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Rows as a lower triangle (float64) times orthonormal rows (float32), and whether to float32's rounding.

    By Cholesky's way where the Gram matrix resolves all directions, or by Householder's.
    """
    wide = rows.to(COMPUTE)
    lower, failed = torch.linalg.cholesky_ex(wide @ wide.mT)
    ends = torch.aminmax(lower.diagonal(dim1=-2, dim2=-1), dim=-1)
    if not bool(failed.any()) and bool((ends.min > _RESOLVED * ends.max).all()):
        eye = torch.eye(lower.shape[-1], dtype=COMPUTE, device=lower.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        condition = torch.linalg.matrix_norm(lower) * torch.linalg.matrix_norm(inverse)
        if bool((condition < _WELL).all()):
            return inverse.to(rows.dtype) @ rows, lower, True
        return torch.linalg.solve_triangular(lower, wide, upper=False).to(rows.dtype), lower, False
    columns, upper = torch.linalg.qr(rows.mT)
    return columns.mT.contiguous(), upper.mT.to(COMPUTE), False
