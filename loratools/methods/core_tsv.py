"""Give every change an equal share of the directions that all span, make those orthogonal, and add the changes.

    wᵢ·ΔWᵢ = L·Mᵢ·Rᵀ;  Mᵢ ≈ Uᵢ·Σᵢ·Vᵢᵀ with the top k = ⌊d / T⌋ of each, d = min(Σ rankᵢ, out, in)
    ΔW = λ·L·U⊥·Σ·V⊥ᵀ·Rᵀ;  U⊥, V⊥ the nearest matrices with orthonormal columns to [U₁ … U_T] and [V₁ … V_T]

Panariello and others: "Accurate and efficient low-rank model merging in core space", arXiv 2509.17786, applying
Gargiulo and others: "Task singular vectors" (TSV-M), arXiv 2412.00081.

Singular values and polar factors do not depend on orthonormal bases, so the core space gives what the full one
does; what it changes is k, which is a share of the space's dimension d rather than of min(out, in). Adapters of one
rank r have k = r, and the result is that of ``tsv``; of adapters of several ranks those above the mean give up
their smallest directions.

Differences from the reference implementation:
- A change of a rank below k gives what it has; there zeros with arbitrary vectors fill up its share.
- Directions that several adapters have in common to rounding are taken once, by a partial isometry (see ``tsv``).
- The weights multiply the changes before anything else; the paper has none.

Time is (out + in)·d², memory in proportion to the factors. Where Σ rankᵢ reaches min(out, in) the space is the
whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.maths.lowrank import Svd, compress, stack
from loratools.maths.orthogonal import orthogonal_sum
from loratools.maths.spectra_ops import core_size, full_size_note, reduced, spectrum
from loratools.methods._base import LAMBDA, RANK, Method, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    factors = [part.factors for part in parts]
    space = reduced(factors, [part.multiplier for part in parts])
    most = options.part_rank or max(1, core_size(space.parts) // len(parts))
    spectra = [spectrum(small) for small in space.parts]
    top = [Svd(found.u[:, :most], found.sigma[:most], found.vh[:most]) for found in spectra]
    compressed = compress(stack([orthogonal_sum(top)], [options.lam]), options.rank)
    expanded = space.expanded(compressed.factors)
    return Outcome(expanded, compressed.energy, compressed.square, full_size_note(factors))


METHOD = Method(
    name="core-tsv",
    summary="Give every change an equal share of the directions that all span, make those orthogonal, and add the "
    "changes.",
    lossless=True,
    options=(
        RANK,
        LAMBDA,
        replace(
            RANK,
            name="part-rank",
            field="part_rank",
            help="How many directions of each adapter are used, a count; an equal share of all without it.",
        ),
    ),
    rule=_combine,
    laws=("identity", "order-free", "homogeneous"),
)
