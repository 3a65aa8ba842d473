"""Rows of vectors that grow block by block, and the orthonormal directions that a block adds to them."""

from __future__ import annotations

import torch

COMPUTE = torch.float64

# Of the diagonal of a Cholesky factor: below this ratio the Gram matrix no longer resolves the smallest direction.
_RESOLVED = 1e-5


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
    first, outer = _orthonormal(image - (image @ basis.mT) @ basis)
    # Twice: where little is new, the first pass leaves rounding errors along the basis.
    second, inner = _orthonormal(first - (first @ basis.mT) @ basis)
    return second, (outer @ inner).mT


def _orthonormal(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as a lower triangle (float64) times orthonormal rows (float32): by Cholesky, or Householder's way."""
    wide = rows.to(COMPUTE)
    lower, failed = torch.linalg.cholesky_ex(wide @ wide.mT)
    ends = torch.aminmax(lower.diagonal(dim1=-2, dim2=-1), dim=-1)
    if not bool(failed.any()) and bool((ends.min > _RESOLVED * ends.max).all()):
        return torch.linalg.solve_triangular(lower, wide, upper=False).to(rows.dtype), lower
    columns, upper = torch.linalg.qr(rows.mT)
    return columns.mT.contiguous(), upper.mT.to(COMPUTE)
