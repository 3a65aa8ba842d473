"""Null-space projection: a matrix without what it does along the main directions of others.

    ΔW' = ΔW·(I − c·V·Vᵀ),   c = μ/(1 + μ), 1 for μ = ∞

V holds the leading right singular vectors of the protected matrix S, the inputs to which it responds most: the fewest
that hold a given share of its Σσ². ΔW' answers none of them (hard, c = 1), so that S + ΔW' does to them what S does.
The soft form is the minimum of ‖X − ΔW‖² + μ·‖X·V‖² over X, which runs from the plain sum (μ = 0) to the hard form.

Chen, Zhou, Zhang, Huang: "NP-LoRA: null space projection unifies subject and style in LoRA fusion", arXiv 2511.11051.

Differences from the paper:
- Directions are counted by energy, so that one setting fits modules of any rank. The paper's k is the rank of the
  protected adapter: all that it has, which is what an energy of 1 means.
- c is 1 unless the caller says otherwise. The paper's own choice is the soft form with μ = 0.5, c = 1/3.
- Several matrices may be protected at once: V then spans the leading directions of all of them. Projections one after
  the other would not do, since the second brings back some of what the first has removed.

On factors only ``down`` changes, down' = down − c·(down·V)·Vᵀ: in·rank·k multiplications, and the rank stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from loratools.errors import OptionError, ShapeError
from loratools.maths.lowrank import COMPUTE, Factors, dense_svd, svd
from loratools.maths.rank import Rule, needed

# Directions that differ by less than √eps of float64 are one.
_ALIKE = 2.0**-26


def protected(part: Factors, styles: Sequence[Factors], energy: float = 1.0, mu: float = math.inf) -> Factors:
    """A matrix without its component along the leading right singular vectors of others.

    For protection in an order of precedence, each of several matrices is given those before it as ``styles``.

    Args:
        part: The matrix that gives way.
        styles: Those that are protected, of its shape (out, in); their scales do not matter, nor does their order.
        energy: The fraction of each one's Σσ² whose directions are protected, in (0, 1]; 1 for all it has.
        mu: The strength μ ≥ 0: 0 changes nothing, infinity removes the component entirely.

    Returns:
        Factors of the same rank, in float64 with the same ``up``; the very same factors where nothing is protected.

    Raises:
        NonFiniteError: A factor of a protected matrix holds NaN or Inf.
        OptionError: The energy or the strength is out of range.
        ShapeError: A protected matrix has another shape.
    """
    if not mu >= 0.0:
        raise OptionError(
            f"protection of strength {mu}",
            expected="A strength is a number of at least 0",
            todo="Pass inf to remove all that lies along the protected directions",
        )
    basis = _basis(part, styles, energy)
    if mu == 0.0 or not basis.shape[1]:
        return part
    share = 1.0 if math.isinf(mu) else mu / (1.0 + mu)
    wide = part.to(COMPUTE)
    return Factors(wide.up, wide.down - share * (wide.down @ basis) @ basis.T)


def leading(style: Factors, energy: float) -> torch.Tensor:
    """The fewest right singular vectors that hold a share of a matrix's Σσ².

    Args:
        style: The matrix.
        energy: The fraction of Σσ², in (0, 1].

    Returns:
        (in, k) float64, orthonormal columns; none for a zero matrix.

    Raises:
        NonFiniteError: A factor holds NaN or Inf.
        OptionError: The energy is out of range.
    """
    if not 0.0 < energy <= 1.0:
        raise OptionError(
            f"protection of the energy {energy}",
            expected="A fraction of Σσ², in (0, 1], was expected",
            todo="Pass 1 to protect every direction",
        )
    found = svd(style)
    sigma = found.sigma.cpu().numpy()
    # Summed as ``needed`` sums, so that a share of 1 is reached.
    whole = float(np.cumsum(np.square(sigma))[-1])
    return found.vh[: needed(Rule("energy", energy), sigma, whole, sigma.size)].T


def _basis(part: Factors, styles: Sequence[Factors], energy: float) -> torch.Tensor:
    """Orthonormal columns (in, k) that span the leading directions of all styles."""
    wrong = [style.shape for style in styles if style.shape != part.shape]
    if wrong:
        raise ShapeError(
            f"a matrix of shape {part.shape} cannot be kept off one of shape {wrong[0]}",
            expected="Matrices of one shape (out, in) were expected",
            todo="Protect adapters of the same base model",
        )
    spans = [leading(style, energy) for style in styles]
    if len(spans) == 1:
        return spans[0]
    columns = torch.cat([part.down.new_zeros(part.shape[1], 0, dtype=COMPUTE), *spans], dim=1)
    found = dense_svd(columns)
    return found.u[:, found.sigma > _ALIKE]
