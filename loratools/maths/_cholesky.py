"""A faster orthogonalisation for factors whose columns are far from dependent.

x = Q·R with R from the Cholesky decomposition of the Gram matrix xᵀx needs one product where Householder reflections
need two passes over x, and products run at the processor's full speed. It squares the condition number, so it is
refused where the columns are close to dependent, and the caller checks what it gave (Yamamoto and others:
"Roundoff error analysis of the Cholesky QR2 algorithm", ETNA 44, 2015).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The least distance of a unit column from the span of those before it. At this value xᵀx still has twelve digits.
LEAST_PIVOT = 1e-2
# The largest deviation from orthonormal columns that is taken for rounding.
ORTHONORMAL = 1e-13


@dataclass(frozen=True, slots=True, eq=False)
class CholeskySide:
    """One factor x (n, rank) as x = Q · core, Q never formed.

    Attributes:
        factor: x.
        core: R (rank, rank), upper triangular.
    """

    factor: torch.Tensor
    core: torch.Tensor

    def expand(self, vectors: torch.Tensor, length: int) -> torch.Tensor:  # noqa: ARG002 - the factor knows
        """Q @ vectors (rank, k), as (n, k)."""
        inner: torch.Tensor = torch.linalg.solve_triangular(self.core, vectors, upper=True)
        if self.factor.is_contiguous():
            return self.factor @ inner
        # BLAS takes many times as long for a turned matrix times a narrow turned one as for the same the other way.
        return (inner.T @ self.factor.T).T


def orthogonalise(factor: torch.Tensor) -> CholeskySide | None:
    """The factor's decomposition, or None where its columns are too close to dependent for it."""
    if factor.shape[0] <= factor.shape[1]:
        return None
    gram = factor.T @ factor
    lengths = gram.diagonal().sqrt()
    if not bool((lengths > 0).all()):
        return None
    lower, failed = torch.linalg.cholesky_ex(gram / (lengths[:, None] * lengths))
    # A comparison with NaN is false: factors that are not finite are left to the careful way, which says so.
    if int(failed) or not float(lower.diagonal().min()) > LEAST_PIVOT:
        return None
    return CholeskySide(factor, lower.T * lengths)


def is_orthonormal(columns: torch.Tensor) -> bool:
    """Whether (n, k) has orthonormal columns to float64's rounding."""
    deviation = columns.T @ columns
    deviation.diagonal().sub_(1.0)
    return (
        float(deviation.abs().max()) <= ORTHONORMAL * max(1, columns.shape[1]) if deviation.numel() else True
    )
