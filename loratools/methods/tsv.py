"""Make the singular directions of all changes orthogonal to each other, then add the changes.

    wᵢ·ΔWᵢ = Uᵢ·Σᵢ·Vᵢᵀ, the top kᵢ of each;  U = [U₁ … U_T], V = [V₁ … V_T], Σ = diag(Σ₁ … Σ_T)
    U⊥, V⊥ = the nearest matrices with orthonormal columns;  ΔW = λ·U⊥·Σ·V⊥ᵀ

Gargiulo and others: "Task singular vectors: reducing task interference in model merging" (TSV-M), arXiv 2412.00081.

Differences from the reference implementation, which is for fully fine-tuned weights:
- kᵢ is the numerical rank of each change, so that nothing is lost; there min(out, in) / T, by which T whole spectra
  fit. That is also the rule here where the ranks add up to more than min(out, in), and ``part-rank`` sets a limit.
- Directions that several adapters have in common to rounding leave U or V without full rank. The nearest
  orthonormal matrix is then not unique; we take the partial isometry without the arbitrary vectors, by which
  identical adapters merge to themselves and opposite ones to 0.
- The weights multiply the changes before anything else; the paper has none.

All of it needs decompositions of the factors and of (Σ kᵢ)² numbers: (out + in)·(Σ kᵢ)² time, and memory in
proportion to the factors. The rank of the result is at most Σ kᵢ ≤ min(out, in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.maths.lowrank import Factors, Svd, compress, stack
from loratools.maths.orthogonal import orthogonal_sum
from loratools.maths.spectra_ops import full_size_note, spectrum
from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    factors = [part.factors for part in parts]
    spectra = [spectrum(stack([part.factors], [part.multiplier])) for part in parts]
    most = _most(spectra, factors[0], options.part_rank)
    top = [Svd(found.u[:, :most], found.sigma[:most], found.vh[:most]) for found in spectra]
    compressed = compress(stack([orthogonal_sum(top)], [options.lam]), options.rank)
    return Outcome(compressed.factors, compressed.energy, compressed.square, full_size_note(factors))


def _most(spectra: Sequence[Svd], like: Factors, asked: int | None) -> int:
    """The most directions of each change, a count: all where they fit beside each other, else equal shares."""
    full = min(like.shape)
    most = asked or full
    if sum(min(most, int(found.sigma.numel())) for found in spectra) > full:
        return max(1, min(most, full // len(spectra)))
    return most


METHOD = Method(
    name="tsv",
    summary="Make the singular directions of all changes orthogonal to each other, then add the changes.",
    lossless=True,
    options=(
        RANK,
        LAMBDA,
        replace(
            RANK,
            name="part-rank",
            field="part_rank",
            help="How many directions of each adapter are used, a count; all of them without it.",
        ),
    ),
    rule=_combine,
    laws=("identity", "order-free", "homogeneous"),
)
