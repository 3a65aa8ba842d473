"""Average the checkpoints of one training run, the later ones counting more.

    ΔW = Σᵢ cᵢ·wᵢ·ΔWᵢ,   cᵢ what the i-th of T checkpoints contributes to  m ← βᵢ·m + (1 − βᵢ)·ΔWᵢ
    moving average (the default):  βᵢ = β, m begins as ΔW₁:    c₁ = β^(T−1);  cᵢ = (1 − β)·β^(T−i)
    power function (``width`` = σ_rel):  βᵢ = (1 − 1/i)^(γ+1):  cᵢ = (i/T)^(γ+1) − ((i−1)/T)^(γ+1)
    σ_rel = √(γ + 1) / ((γ + 2)·√(γ + 3))

Karras and others: "Analyzing and improving the training dynamics of diffusion models", arXiv 2312.02696. σ_rel is the
standard deviation of the profile as a fraction of the run: the paper keeps 0.05 and 0.1, and 0.2886 is nearly the mean.

The order is that of the inputs, oldest first; every checkpoint stands for an equal span of the run. The moving average
is biased towards the first checkpoint, which counts as if it had been there forever: among few checkpoints β^(T−1) is
most of the whole (0.63 of ten at β = 0.95). The power function has no such bias.

Differences from post-hoc EMA scripts such as musubi-tuner's:
- ΔW is averaged. There up and down are averaged by themselves, whose product holds cross terms of all pairs.
- The i-th checkpoint has i spans behind it. There the power function counts from the second, and drops the first.
- Σ cᵢ = 1, and the weights multiply on top of that; a weight of 0 takes a checkpoint out of the sequence.

The paper stores averages during training and fits any other profile to them afterwards; here the checkpoints are plain
ones. A checkpoint that does not change a weight is not in that weight's sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from loratools.maths.averages import WIDEST, moving_average, power_average
from loratools.maths.means import weighted_sum
from loratools.methods._base import RANK, Method, Option, Options, Outcome, Part


def _combine(parts: Sequence[Part], options: Options) -> Outcome:
    ordered = sorted(parts, key=lambda part: part.source)
    count, width = len(ordered), options.width
    shares = power_average(count, width) if width else moving_average(count, options.beta)
    coefficients = [float(share) * part.multiplier for share, part in zip(shares, ordered, strict=True)]
    return Outcome(*weighted_sum([part.factors for part in ordered], coefficients, options.rank))


METHOD = Method(
    name="ema",
    summary="Average the checkpoints of one training run, the later ones counting more.",
    lossless=True,
    options=(
        RANK,
        Option(
            "beta",
            "beta",
            0.95,
            "Share that the past keeps at each checkpoint, where no width is given.",
            "a fraction in [0, 1)",
            lambda value: 0.0 <= value < 1.0,
        ),
        Option(
            "width",
            "width",
            0.0,
            "Relative width σ_rel of a power-function average, instead of beta; 0 for none.",
            "0, or a fraction of the run in (0, 0.2886]",
            lambda value: 0.0 <= value <= WIDEST,
        ),
    ),
    rule=_combine,
    laws=("identity", "homogeneous"),
)
