"""Subspace boosting: small singular values of a merged matrix are raised to one that its largest ones set.

    σⱼ ← max(σⱼ, σⱼ*),   j* the first index with (σ₁ + … + σⱼ*) / Σσ ≥ share

Skorobogat, Roth, Georgescu, Akata: "Subspace-boosted model merging", arXiv 2506.16506. The mass that is cumulated
is that of the singular values themselves, as in the reference implementation, not of their squares. Its shares are
small, 0.01 by default: of a full matrix's thousands of values. A merged LoRA has a few dozen, of which the first
may hold more than that; then all of them are raised to σ₁.

Unlike the reference implementation, which also raises the zeros of a rank-deficient matrix, only singular values
above rounding are: the vectors of the others are arbitrary, and boosting them would add directions that no adapter
has.
"""

from __future__ import annotations

import torch

from loratools.errors import OptionError
from loratools.maths.lowrank import Factors, Svd, balanced
from loratools.maths.spectra_ops import spectrum

# What cumulated sums are off by.
_ROUNDING = 2.0**-44


def boosted(factors: Factors, share: float) -> Factors:
    """The same singular vectors with the smaller singular values raised.

    Args:
        factors: The merged matrix.
        share: The fraction of Σσ at which the values to be raised begin, in [0, 1]: 0 makes all values equal to the
            largest, 1 changes nothing.

    Returns:
        Float64 factors at the numerical rank with √σ on both sides.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
        OptionError: The share lies outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise OptionError(
            f"boost {share}",
            expected="A share of the sum of all singular values, in [0, 1], was expected",
            todo="Pass 1 to raise nothing, or a smaller share to raise more",
        )
    found = spectrum(factors)
    if not found.sigma.numel():
        return balanced(found)
    cumulated = found.sigma.cumsum(0)
    reached = int((cumulated < (share - _ROUNDING) * cumulated[-1]).sum())
    raised = torch.clamp(found.sigma, min=float(found.sigma[reached]))
    return balanced(Svd(found.u, raised, found.vh))
