"""Which merge method suits some adapters: rules over a comparison's figures, stated one by one.

These are rules of thumb, not results: which merge is best is for whoever uses it to see, and nothing here knows what
the adapters were trained for. They rest on four figures.

* Agreement: cosines of ΔW, and the energy of the plain sum, ‖ΣΔW‖² / Σ‖ΔW‖². It is 1 where adapters are orthogonal,
  their count where they are equal, 0 where they cancel. Interference is what makes it differ from 1.
* Shared directions: the overlap of column and row spaces, less what random spaces of the same dimensions overlap, as a
  share of what is left: (overlap − chance) / (1 − chance). Two adapters may be orthogonal as matrices and yet write to
  the same outputs.
* Sign conflict: how much of Σ|a·b| lies in elements of opposite signs; about a half for unrelated adapters, so that
  only that of related ones tells anything.
* Balance: the largest norm by the smallest. A weaker adapter is outvoted by whatever elects or trims by magnitude.

Of copies one is enough, and of two opposites no merge keeps both: electing a sign leaves nothing where they are equally
strong. The others are left out with a weight of 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from loratools.ops.compare_results import ComparedPair, Matrix, Suggestion

# Cosines from here on: doing nearly the same, and working against each other.
_ALIKE, _OPPOSED = 0.7, -0.3
# Down to here, what one adds is what the other takes away.
_OPPOSITE = -0.99
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
        conflict: The largest sign conflict of related adapters; None where none are, or it was not computed.
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
    undone = _undone(norms, cosines, active)
    seen = _seen(norms, cosines, pairs, active)
    active = [index for index in active if index not in undone]
    left = [0.0 if index in spare or index in undone else weight for index, weight in enumerate(weights)]
    method, factor, reasons = "linear", 1.0, [_undoing(cosines, undone)] if undone else []
    if len(active) > 1:
        kept = _seen(norms, cosines, pairs, active)
        method, factor, reason = _choice(kept, len(active))
        reasons.append(reason)
        if kept.imbalance >= _UNBALANCED:
            reasons.append(_balance(norms, active, left, kept.imbalance))
    if spare:
        reasons.append(
            f"Of adapters that are the same, one is enough: {_counted(spare)} left out with weight 0."
        )
    if seen.shared is None:
        reasons.append(
            "Overlap and sign conflict were not computed for so many adapters; the cosines alone decide."
        )
    return Suggestion(method, tuple(weight * factor for weight in left), tuple(reasons), _figures(seen))


def _figures(seen: _Seen) -> dict[str, float | None]:
    """What a suggestion rests on, by name."""
    return {
        "smallest cosine": seen.least,
        "largest cosine": seen.most,
        "mean cosine": seen.mean,
        "energy of the sum": seen.sum_energy,
        "excess overlap": seen.shared,
        "sign conflict": seen.conflict,
        "largest norm by smallest": seen.imbalance,
    }


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


def _undone(norms: Sequence[float], cosines: Matrix, active: Sequence[int]) -> dict[int, int]:
    """The opposites of stronger adapters, or of earlier ones where both are as strong, each with that adapter."""
    found: dict[int, int] = {}
    ranked = sorted(active, key=lambda index: (-norms[index], index))
    for place, index in enumerate(ranked):
        for other in ranked[:place]:
            cosine = cosines[index][other]
            if other not in found and cosine is not None and cosine <= _OPPOSITE:
                found[index] = other
                break
    return found


def _undoing(cosines: Matrix, undone: Mapping[int, int]) -> str:
    pairs = ", ".join(
        f"{index + 1} of {other + 1} (cosine {_short(cosines[index][other] or 0.0)})"
        for index, other in sorted(undone.items())
    )
    return f"Opposites: {pairs}. No merge keeps both, so the weaker is left out with weight 0."


def _short(value: float) -> str:
    """Two decimals, without a sign where they are zeros."""
    return f"{value:.2f}".replace("-0.00", "0.00")


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
    conflicts = [
        each.sign_conflict
        for each in relations
        if each.sign_conflict is not None and abs(each.cosine or 0.0) >= _UNRELATED
    ]
    values = [cosine for cosine, _, _ in found]
    own = [norms[index] for index in active]
    return _Seen(
        least=min(values),
        most=max(values),
        mean=math.fsum(values) / len(values),
        sum_energy=max(0.0, 1.0 + crossed / total),
        shared=max(excess, default=0.0) if pairs else None,
        conflict=max(conflicts, default=None),
        imbalance=max(own) / min(own),
    )


def _excess(overlap: float, chance: float) -> float:
    """What an overlap is above chance; 0 where random spaces must overlap wholly."""
    return (overlap - chance) / (1.0 - chance) if chance < 1.0 else 0.0


def _choice(seen: _Seen, count: int) -> tuple[str, float, str]:
    """The method, what the weights are multiplied by, and why; the first rule that holds."""
    mean, energy = _short(seen.mean), f"{seen.sum_energy:.1f}"
    if seen.least <= _OPPOSED:
        text = f"Some work against each other (cosine {_short(seen.least)}): a sum cancels them. Electing a sign keeps "
        return "ties", 1.0, text + "the stronger."
    if seen.mean >= _ALIKE:
        text = f"They do nearly the same (mean cosine {mean}): a plain sum has {energy} times the energy. Average them."
        return "linear", 1.0 / count, text
    largest = max(abs(seen.least), abs(seen.most))
    if largest < _UNRELATED and (seen.shared is None or seen.shared < _SHARED):
        text = f"They are nearly orthogonal (no cosine beyond {largest:.1g} either way): the exact sum keeps each of "
        return "linear", 1.0, text + "them whole."
    if largest < _UNRELATED or (seen.shared or 0.0) >= _SHARED > abs(seen.mean):
        text = f"They use the same directions (overlap {seen.shared or 0.0:.0%} above chance) for different things "
        text += f"(mean cosine {mean}): tsv makes the singular vectors of all orthogonal to each other."
        return "tsv", 1.0, text
    if seen.conflict is not None and seen.conflict >= _CONFLICT:
        how = "agree" if seen.mean > 0.0 else "work against each other"
        text = f"They {how} in part (mean cosine {mean}) and conflict in sign in part ({seen.conflict:.0%}): "
        return "knots-ties", 1.0, text + "knots-ties elects signs in directions that they have in common."
    text = f"They agree in part (mean cosine {mean}) and seldom conflict in sign: the sum, scaled from {energy} times "
    return "linear", seen.sum_energy**-0.5, text + "the energy to that of unrelated ones."


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
        f"The strongest has {imbalance:.1f} times the norm of the weakest, which shows little beside it; --weights "
        f"{even} would make them equal, if that is what you want."
    )
