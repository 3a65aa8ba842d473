"""Take the changes apart into rank-one units, group similar ones, and build the result from one unit per group.

    ΔWᵢ = Σⱼ σⱼ·uⱼ·vⱼᵀ;  units xⱼ = [√(|wᵢ|·σⱼ)·uⱼ; √(|wᵢ|·σⱼ)·vⱼ];  k groups by k-means
    c = mean of a group's units, scaled so that ‖c‖_∞ is the mean of their ‖x‖_∞, = [b; a];  ΔW = λ·√(r / k)·Σ b·aᵀ

Zhao and others: "Merging LoRAs like playing LEGO: pushing the modularity of LoRA to extremes through rank-wise
clustering", arXiv 2409.16167. k is ``rank``, or the largest rank of the adapters. The two scales are the paper's dual
reweighting: of parameters, since a mean is smaller than what it is the mean of, and of the output, since k units vary
more than r do.

Differences from the paper:
- Units are singular directions. The paper's are the columns of up with the rows of down as they were trained, which
  depend on the training's path: up·G and G⁻¹·down are the same change in other units.
- r is the mean of the adapters' ranks; the paper's is the one rank that all of its have.
- A unit and its negative (−u, −v) are the same product, so groups are formed up to that sign. Between orthogonal
  units, as those of one adapter are, nothing chooses it: there the largest entry of each is positive.
- The paper has no weights. Here |wᵢ| scales the units, and a group's product is multiplied by Σ ±‖x‖² / Σ ‖x‖² over
  its units, − for those of negative weight: 1 where no weight is negative, and 0 where an adapter meets its
  negative.
- Groups come from several k-means++ starts whose draws depend on the seed and the module; units are sorted by length
  first, so that the order of the adapters does not matter.

For R = Σ rankᵢ units the grouping needs their R x R inner products; time is (out + in)·R² + R²·k per iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from loratools.maths.draws import key_of
from loratools.maths.lowrank import Factors, Svd, balanced, stack
from loratools.maths.spectra_ops import full_size_note, spectrum
from loratools.maths.units import grouped, joined, upright
from loratools.methods._base import LAMBDA, RANK, SEED, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    factors = [part.factors for part in parts]
    spectra = [spectrum(part.factors) for part in parts]
    ranks = [int(found.sigma.numel()) for found in spectra]
    units, signs = _units(parts, spectra)
    if not bool(units.any()):
        return Outcome(balanced(Svd(spectra[0].u[:, :0], spectra[0].sigma[:0], spectra[0].vh[:0])))
    key = key_of(options.seed, options.key, "lego")
    members = grouped(units @ units.T, options.rank or max(ranks), key)
    out = factors[0].shape[0]
    centres = joined(units, members, out, signs)
    scale = options.lam * (sum(ranks) / len(ranks) / centres.shape[0]) ** 0.5
    merged = stack([Factors(centres[:, :out].T, centres[:, out:])], [scale])
    return Outcome(merged, note=full_size_note(factors))


def _units(parts: Sequence[Part], spectra: Sequence[Svd]) -> tuple[torch.Tensor, torch.Tensor]:
    """All units, (R, out + in), the longest first, and the sign of the weight of each, (R,)."""
    rows, signs = [], []
    for part, found in zip(parts, spectra, strict=True):
        root = (abs(part.multiplier) * found.sigma).sqrt()
        rows.append(torch.cat([(found.u * root).T, root[:, None] * found.vh], dim=1))
        signs.append(torch.full_like(found.sigma, -1.0 if part.multiplier < 0 else 1.0))
    units, sign = upright(torch.cat(rows)), torch.cat(signs)
    order = torch.argsort(torch.linalg.vector_norm(units, dim=1), descending=True, stable=True)
    return units[order], sign[order]


METHOD = Method(
    name="lego",
    summary="Take the changes apart into rank-one units, group similar ones, and build the result from one unit per "
    "group.",
    lossless=True,
    options=(
        replace(
            RANK,
            help="Number of groups of rank-one units, a count, which is the rank of the result; the largest of the "
            "adapters' ranks without it.",
        ),
        LAMBDA,
        replace(SEED, help="Seed of the starts of the grouping."),
    ),
    rule=_combine,
    laws=("identity", "order-free", "homogeneous"),
)
