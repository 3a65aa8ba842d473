"""Add the changes and give all directions of the sum the same strength.

    Σᵢ wᵢ·ΔWᵢ = U·diag(σ)·Vᵀ;  ΔW = λ·σ̄·U·Vᵀ,   σ̄ = (1/ρ)·Σⱼ σⱼ,  ρ the numerical rank of the sum

Marczak and others: "No task left behind: isotropic model merging with common and task-specific subspaces" (Iso-C),
arXiv 2502.04959.

Differences from the reference implementation, which is for fully fine-tuned weights:
- The mean is over the ρ singular values above rounding. There it is over all min(out, in): of a sum of LoRAs nearly
  all are zeros, whose singular vectors are arbitrary. They would get strength in directions that no adapter has, and
  those that are in the adapters would lose it.
- The weights multiply the changes before anything else; the paper has none.

With ``rank`` the directions that had the largest σⱼ are kept, at the mean of all. The sum is never formed: its
decomposition is that of the stacked factors, (out + in)·(Σ rankᵢ)² time at most and no more than a full matrix's.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.lowrank import stack
from loratools.maths.spectra_ops import flattened, full_size_note, spectrum
from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    factors = [part.factors for part in parts]
    found = spectrum(stack(factors, [part.multiplier for part in parts]))
    mean = float(found.sigma.mean()) if found.sigma.numel() else 0.0
    flat = flattened(found, options.lam * mean, options.rank)
    return Outcome(flat.factors, flat.energy, flat.square, full_size_note(factors))


METHOD = Method(
    name="iso-c",
    summary="Add the changes and give all directions of the sum the same strength.",
    lossless=True,
    options=(RANK, LAMBDA),
    rule=_combine,
    laws=("order-free", "homogeneous"),
)
