"""Keep the strongest common directions of the sum, add each adapter's own beside them, and level their strength.

    τᵢ = wᵢ·ΔWᵢ;  Σᵢ τᵢ = U·diag(σ)·Vᵀ;  U_c, σ_c, V_c its top k;  d = min(Σ rankᵢ, out, in)
    (I − U_c·U_cᵀ)·τᵢ = Uᵢ·diag(σᵢ)·Vᵢᵀ, the top s of each;  k = d − s·T,  s·T ≈ (1 − ``common``)·d
    U⊥, V⊥ = nearest orthonormal to [U_c U₁ … U_T], [V_c V₁ … V_T];  ΔW = λ·σ̄·U⊥·V⊥ᵀ,  σ̄ = mean(σ_c, σ₁ … σ_T)

Marczak and others: "No task left behind: isotropic model merging with common and task-specific subspaces" (Iso-CTS),
arXiv 2502.04959. The default ``common`` of 0.8 is the reference implementation's.

Differences from the reference implementation, which is for fully fine-tuned weights:
- The directions that are shared out are the d that the adapters can have together; there all min(out, in), of which
  a sum of LoRAs leaves most without any content (see ``iso-c``). The rule is the same: ⌊common · d⌋ at first, and
  what is left rounded to a multiple of T, half to even.
- Directions without content above rounding are left out and do not count in σ̄: an adapter of low rank may have
  fewer than s of its own.
- Directions that are equal to rounding are taken once, by a partial isometry, where the nearest orthonormal matrix
  is not unique.
- The weights multiply the changes before anything else; the paper has none.

With ``rank`` the directions with the largest of these σ are kept. All decompositions are of factors: time is (out +
in)·(Σ rankᵢ)² and T times that of a QR decomposition of one adapter's factors; memory is in proportion to the
factors.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.lowrank import COMPUTE, Factors, Svd, compress, numerical_rank, stack
from loratools.maths.orthogonal import leading, orthogonal_sum
from loratools.maths.spectra_ops import core_size, even, full_size_note, spectrum
from loratools.methods._base import LAMBDA, RANK, Method, Option, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    scaled = [even(part.factors, part.multiplier) for part in parts]
    shared, own = _shares(core_size(scaled), len(scaled), options.common)
    common = _top(spectrum(stack(scaled, [1.0] * len(scaled))), shared)
    spectra = [common, *[_top(_beside(part, common), own) for part in scaled]]
    count = sum(int(found.sigma.numel()) for found in spectra)
    mean = sum(float(found.sigma.sum()) for found in spectra) / count if count else 0.0
    merged = stack([orthogonal_sum(spectra, mean)], [options.lam])
    # All strengths are equal: which directions a lower rank keeps is told by those that they had before.
    found = leading(merged, options.rank) if options.rank else compress(merged)
    note = full_size_note([part.factors for part in parts])
    return Outcome(found.factors, found.energy, None, note)


def _shares(dimension: int, count: int, common: float) -> tuple[int, int]:
    """How many directions are common and how many each of ``count`` adapters adds, in ``dimension`` together."""
    own = round((dimension - int(dimension * common)) / count)
    own = min(own, dimension // count)
    return dimension - own * count, own


def _beside(part: Factors, common: Svd) -> Svd:
    """What of a change lies outside the common directions of its columns."""
    rest = spectrum(Factors(part.up - common.u @ (common.u.T @ part.up), part.down))
    # Its rounding is that of the whole change: of one that is all common, nothing is left.
    eps = float(max(part.shape)) * 2.0**-52
    floor = eps * float((part.up.norm(dim=0) * part.down.norm(dim=1)).sum())
    return _top(rest, numerical_rank(rest.sigma, part.shape, COMPUTE, floor))


def _top(found: Svd, count: int) -> Svd:
    return Svd(found.u[:, :count], found.sigma[:count], found.vh[:count])


COMMON = Option(
    "common",
    "common",
    0.8,
    "Fraction of the result's directions that come from the sum of all adapters; the rest is each one's own.",
    "a fraction in [0, 1]",
    lambda value: 0.0 <= value <= 1.0,
)

METHOD = Method(
    name="iso-cts",
    summary="Keep the strongest common directions of the sum, add each adapter's own beside them, and level their "
    "strength.",
    lossless=True,
    options=(RANK, LAMBDA, COMMON),
    rule=_combine,
    laws=("order-free", "homogeneous"),
)
