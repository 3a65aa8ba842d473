"""Add the changes and spread the strength of the sum evenly over as many directions as the adapters have together.

    Σᵢ wᵢ·ΔWᵢ = U·diag(σ)·Vᵀ;  ΔW = λ·σ̄·U·Vᵀ,   σ̄ = (1/d)·Σⱼ σⱼ,  d = min(Σ rankᵢ, out, in)

Panariello and others: "Accurate and efficient low-rank model merging in core space", arXiv 2509.17786, applying
Marczak and others: "No task left behind" (Iso-C), arXiv 2502.04959.

Singular values do not depend on orthonormal bases, so isotropy in the core space is that of the full one; what the
core space changes is over how many values the mean is taken, its dimension d instead of min(out, in). Adapters that
share no direction have d directions in their sum, and the result is that of ``iso-c``. Where some are common to
several or cancel the sum has fewer: ``iso-c`` then takes the mean of those, and this method leaves the level as it
is.

Differences from the reference implementation: only the directions above rounding get strength, since the vectors of
the others are arbitrary, and rankᵢ is the numerical one. The weights multiply the changes before anything else; the
paper has none. With ``rank`` the directions that had the largest σⱼ are kept.

Time is (out + in)·(Σ rankᵢ)² at most. Where Σ rankᵢ reaches min(out, in) the core is the whole space, and d is
min(out, in).
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.lowrank import stack
from loratools.maths.spectra_ops import core_size, even, flattened, full_size_note, spectrum
from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    scaled = [even(part.factors, part.multiplier) for part in parts]
    found = spectrum(stack(scaled, [1.0] * len(scaled)))
    level = float(found.sigma.sum()) / core_size(scaled)
    flat = flattened(found, options.lam * level, options.rank)
    note = full_size_note([part.factors for part in parts])
    return Outcome(flat.factors, flat.energy, flat.square, note)


METHOD = Method(
    name="core-iso",
    summary="Add the changes and spread the strength of the sum evenly over as many directions as the adapters have "
    "together.",
    lossless=True,
    options=(RANK, LAMBDA),
    rule=_combine,
    laws=("order-free", "homogeneous"),
)
