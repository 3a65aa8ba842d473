"""Which merge method suits some adapters: rules over a comparison's figures, stated one by one.

These are rules of thumb, not results: which merge is best is for whoever uses it to see, and nothing here knows what
the adapters were trained for. They rest on four figures.

* Agreement: cosines of ΔW, and the energy of the plain sum, ‖ΣΔW‖² / Σ‖ΔW‖². It is 1 where adapters are orthogonal,
  their count where they are equal, 0 where they cancel. Interference is what makes it differ from 1.
* Shared directions: the overlap of column and row spaces, less what random spaces of the same dimensions overlap, as a
  share of what is left: (overlap − chance) / (1 − chance). Two adapters may be orthogonal as matrices and yet write to
  the same outputs.
* Sign conflict: how much of Σ|a·b| lies in elements of opposite signs; about a half for unrelated adapters.
* Balance: the largest norm by the smallest. A weaker adapter is outvoted by whatever elects or trims by magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from loratools.ops.compare_results import ComparedPair, Matrix, Suggestion

# Cosines from here on: doing nearly the same, and working against each other.
_ALIKE, _OPPOSED = 0.7, -0.3
# Cosines below this are those of unrelated adapters: two of one subject seldom come below it.
_UNRELATED = 0.1
# Excess overlap from here on: the same directions are used.
_SHARED = 0.1
# Sign conflict from here on, of adapters that agree in part; at 0.5 nothing is shared but magnitudes.
_CONFLICT = 0.3
# Norms that differ by this factor: the weaker adapter hardly shows in a plain sum.
_UNBALANCED = 2.0


class _Seen(NamedTuple):
    """The figures.

    Attributes:
        least: The smallest cosine.
        most: The largest.
        mean: The mean.
        sum_energy: ‖ΣΔW‖² / Σ‖ΔW‖².
        shared: The largest excess overlap of column or row spaces; None where it was not computed.
        conflict: The largest sign conflict; None likewise.
        imbalance: The largest norm by the smallest.
    """

    least: float
    most: float
    mean: float
    sum_energy: float
    shared: float | None
    conflict: float | None
    imbalance: float


def suggestion(
    norms: Sequence[float],
    cosines: Matrix,
    pairs: Sequence[ComparedPair],
    weights: Sequence[float],
    same: Sequence[Sequence[int]],
) -> Suggestion | None:
    """The method that suits adapters, with the reasons.

    Args:
        norms: ‖ΔW‖_F of each, weight included.
        cosines: Of all pairs.
        pairs: In full; empty where there are too many.
        weights: What the adapters were multiplied by.
        same: Positions of adapters with the same ΔW, group by group.

    Returns:
        None where fewer than two change anything.
    """
    if sum(norm > 0.0 for norm in norms) < 2:
        return None
    spare = {index for group in same for index in group[1:]}
    active = [index for index, norm in enumerate(norms) if norm > 0.0 and index not in spare]
    if len(active) < 2:
        return _one_is_enough(norms, weights)
    seen = _seen(norms, cosines, pairs, active)
    method, factor, reason = _choice(seen, len(active))
    reasons = [reason]
    if spare:
        reasons.append(
            f"Of adapters that are the same, one is enough: {_counted(spare)} left out with weight 0."
        )
    if seen.shared is None:
        reasons.append(
            "Overlap and sign conflict were not computed for so many adapters; the cosines alone decide."
        )
    if seen.imbalance >= _UNBALANCED:
        reasons.append(_balance(norms, active, weights, seen.imbalance))
    return Suggestion(
        method=method,
        weights=tuple(0.0 if index in spare else weight * factor for index, weight in enumerate(weights)),
        reasons=tuple(reasons),
        figures={
            "smallest cosine": seen.least,
            "largest cosine": seen.most,
            "mean cosine": seen.mean,
            "energy of the sum": seen.sum_energy,
            "excess overlap": seen.shared,
            "sign conflict": seen.conflict,
            "largest norm by smallest": seen.imbalance,
        },
    )


def _one_is_enough(norms: Sequence[float], weights: Sequence[float]) -> Suggestion:
    """What to say where all that change anything are the same."""
    count = sum(norm > 0.0 for norm in norms)
    return Suggestion(
        method="linear",
        weights=tuple(weight / count for weight in weights),
        reasons=(
            f"They are the same adapter: one is enough, and their plain sum would be {count} times as strong.",
        ),
        figures={"energy of the sum": float(count)},
    )


def _counted(indices: Iterable[int]) -> str:
    """Adapters by the numbers that reports give them."""
    return ", ".join(str(index + 1) for index in sorted(indices))


def _seen(
    norms: Sequence[float], cosines: Matrix, pairs: Sequence[ComparedPair], active: Sequence[int]
) -> _Seen:
    found = [(cosines[i][j] or 0.0, i, j) for i in active for j in active if i < j]
    total = sum(norms[index] ** 2 for index in active)
    crossed = sum(2.0 * cosine * norms[i] * norms[j] for cosine, i, j in found)
    relations = [pair.relation for pair in pairs if {pair.first, pair.second} <= set(active)]
    excess = [
        _excess(overlap, chance)
        for each in relations
        for overlap, chance in (
            (each.column_overlap, each.column_chance),
            (each.row_overlap, each.row_chance),
        )
        if overlap is not None and chance is not None
    ]
    conflicts = [each.sign_conflict for each in relations if each.sign_conflict is not None]
    values = [cosine for cosine, _, _ in found]
    own = [norms[index] for index in active]
    return _Seen(
        least=min(values),
        most=max(values),
        mean=math.fsum(values) / len(values),
        sum_energy=max(0.0, 1.0 + crossed / total),
        shared=max(excess, default=0.0) if pairs else None,
        conflict=max(conflicts, default=0.0) if pairs else None,
        imbalance=max(own) / min(own),
    )


def _excess(overlap: float, chance: float) -> float:
    """What an overlap is above chance; 0 where random spaces must overlap wholly."""
    return (overlap - chance) / (1.0 - chance) if chance < 1.0 else 0.0


def _choice(seen: _Seen, count: int) -> tuple[str, float, str]:
    """The method, what the weights are multiplied by, and why; the first rule that holds."""
    if seen.least <= _OPPOSED:
        text = "Some work against each other (cosine {:.2f}): a sum cancels them. Electing a sign keeps the stronger."
        return "ties", 1.0, text.format(seen.least)
    if seen.mean >= _ALIKE:
        text = "They do nearly the same (mean cosine {:.2f}): a plain sum has {:.1f} times the energy. Average them."
        return "linear", 1.0 / count, text.format(seen.mean, seen.sum_energy)
    unrelated = max(abs(seen.least), abs(seen.most)) < _UNRELATED
    if unrelated and (seen.shared is None or seen.shared < _SHARED):
        text = (
            "They are nearly orthogonal (cosines {:.2f} to {:.2f}): the exact sum keeps each of them whole."
        )
        return "linear", 1.0, text.format(seen.least, seen.most)
    if unrelated or (seen.shared or 0.0) >= _SHARED > abs(seen.mean):
        text = "They use the same directions (overlap {:.0%} above chance) for different things (mean cosine {:.2f}): "
        text += "tsv makes the singular vectors of all orthogonal to each other."
        return "tsv", 1.0, text.format(seen.shared or 0.0, seen.mean)
    if seen.conflict is not None and seen.conflict >= _CONFLICT:
        text = "They agree in part (mean cosine {:.2f}) and conflict in sign in part ({:.0%}): knots-ties elects signs "
        text += "in directions that they have in common."
        return "knots-ties", 1.0, text.format(seen.mean, seen.conflict)
    text = "They agree in part (mean cosine {:.2f}) and seldom conflict in sign: the sum, scaled from {:.1f} times "
    text += "the energy to that of unrelated ones."
    return "linear", seen.sum_energy**-0.5, text.format(seen.mean, seen.sum_energy)


def _balance(
    norms: Sequence[float], active: Sequence[int], weights: Sequence[float], imbalance: float
) -> str:
    """What to say of norms that differ: the weights that even them, none of them above what was given."""
    least = min(norms[index] for index in active)
    even = ",".join(
        f"{weight * least / norm:.3g}" if norm else f"{weight:.3g}"
        for norm, weight in zip(norms, weights, strict=True)
    )
    return (
        f"The strongest has {imbalance:.1f} times the norm of the weakest; --weights {even} would make them equal, "
        "if that is what you want."
    )
