"""The ranks of a resize: for a module from its own spectrum, or for all modules from all of them together.

Against a base, a direction counts by what it changes relative to the weight it is added to: σ_j / ‖W‖, with the
Frobenius norm ‖W‖_F = sqrt(ΣΣW²) (the default) or the spectral norm ‖W‖₂, the largest singular value of W. Within a
module this changes nothing; between modules it moves ranks to those whose weights are small. Scoring by norms of the
checkpoint was introduced by resize_lora (E. Gaeros), whose recipe keeps directions above a threshold of
log₁₀(σ_j / ‖W‖_F); here the same scores serve the usual rules:

- energy F: the fewest directions, all modules together, whose squared scores add up to F of all squared scores;
- error F: the same with 1 − F²;
- ratio F: in each module, those with σ_j ≥ F · ‖W‖ (above 1: ‖W‖ / F);
- size: directions in the order of squared score per byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from loratools.errors import OptionError
from loratools.maths.rank import Float64, allocate, needed
from loratools.model import Module, Target
from loratools.ops._resize_module import Spectrum, has_kernel
from loratools.ops._resize_options import Options, bucket

Measure = Callable[[Mapping[Target, int]], int]
# What sums of squares are off by; a sum that falls short of its share by less has reached it.
_ROUNDING = 4 * float(np.finfo(np.float64).eps)


class Known(NamedTuple):
    """What is known of one module before ranks are spent.

    Attributes:
        module: In the input.
        spectrum: Of its ΔW.
        norm: Of the base weight; None where directions are not scored against it.
    """

    module: Module
    spectrum: Spectrum
    norm: float | None = None

    def scores(self, limit: int | None) -> Float64:
        """What its directions count for, as many as it may keep."""
        # A weight that is zero has no spectrum to measure by: what is added to it counts as it is.
        found: Float64 = self.spectrum.sigma[:limit] / (self.norm or 1.0)
        return found


def own(asked: Options, module: Module, spectrum: Spectrum) -> int:
    """The rank that a module needs by itself; 0 where it is zero."""
    wide = has_kernel(module)
    found = needed(asked.rule(wide=wide), spectrum.sigma, spectrum.total, spectrum.sigma.size) or 0
    return min(asked.rounded(found, wide=wide), spectrum.sigma.size)


def together(
    asked: Options, known: Mapping[Target, Known], *, costs: Mapping[Target, int], measure: Measure
) -> dict[Target, int]:
    """The ranks of all modules where they depend on one another; each at least 1.

    Args:
        asked: What was asked for.
        known: By target.
        costs: Bytes of one more rank, by target.
        measure: The bytes of the file for given ranks, header included.

    Raises:
        OptionError: A size that not even the smallest ranks fit into.
    """
    if asked.kind == "size":
        found = _of_size(asked, known, costs, measure)
    elif asked.norm and asked.kind == "ratio":
        found = {target: _above(asked, each) for target, each in known.items()}
    elif asked.norm:
        found = _fewest(asked, known)
    else:
        found = {target: own(asked, each.module, each.spectrum) for target, each in known.items()}
    if asked.server:
        rank = bucket(asked, max(found.values(), default=1))
        found = dict.fromkeys(found, rank)
    return {target: max(1, rank) for target, rank in found.items()}


def _limit(asked: Options, known: Known) -> int | None:
    return asked.limit(wide=has_kernel(known.module))


def _above(asked: Options, known: Known) -> int:
    """How many directions of a module reach a share of its weight's norm."""
    share = asked.value if asked.value <= 1.0 else 1.0 / asked.value
    wide = has_kernel(known.module)
    most = int(known.spectrum.sigma.size)
    found = max(int(np.count_nonzero(known.scores(None) >= share)), asked.least)
    limit = asked.limit(wide=wide)
    found = found if limit is None else min(found, limit)
    return min(asked.rounded(found, wide=wide), most)


def _fewest(asked: Options, known: Mapping[Target, Known]) -> dict[Target, int]:
    """The fewest directions of all modules together that hold the share of all squared scores."""
    total = sum(each.spectrum.total / (each.norm or 1.0) ** 2 for each in known.values())
    share = asked.value if asked.kind == "energy" else 1.0 - asked.value**2
    owners, squares = [], []
    ranks: dict[Target, int] = {}
    kept = 0.0
    for number, (target, each) in enumerate(known.items()):
        scores = np.square(each.scores(_limit(asked, each)))
        ranks[target] = min(asked.least, int(scores.size))
        kept += float(scores[: ranks[target]].sum())
        squares.append(scores[ranks[target] :])
        owners.append(np.full(squares[-1].size, number))
    flat, owner = np.concatenate(squares), np.concatenate(owners)
    order = np.argsort(-flat, kind="stable")
    sums = kept + np.concatenate([[0.0], np.cumsum(flat[order])])
    enough = np.flatnonzero(sums >= total * (share - _ROUNDING))
    count = int(enough[0]) if enough.size else order.size
    more = np.bincount(owner[order[:count]], minlength=len(known))
    return {
        target: _rounded(asked, known[target], rank + int(extra))
        for (target, rank), extra in zip(ranks.items(), more, strict=True)
    }


def _rounded(asked: Options, known: Known, rank: int) -> int:
    wide = has_kernel(known.module)
    return min(asked.rounded(rank, wide=wide), int(known.spectrum.sigma.size)) if rank else 0


def _of_size(
    asked: Options, known: Mapping[Target, Known], costs: Mapping[Target, int], measure: Measure
) -> dict[Target, int]:
    """The ranks that keep most within a file of a size."""
    budget = int(asked.value)
    scores = [_blocks(each.scores(_limit(asked, each)), asked.multiple) for each in known.values()]
    sizes = [int(each.spectrum.sigma.size) for each in known.values()]
    prices = [costs[target] * asked.multiple for target in known]
    least = -(-asked.least // asked.multiple)
    fewest = [min(least, len(each)) for each in scores]
    paid = sum(count * price for count, price in zip(fewest, prices, strict=True))

    def ranks_of(blocks: Sequence[int]) -> dict[Target, int]:
        pairs = zip(known, blocks, sizes, strict=True)
        return {target: max(1, min(count * asked.multiple, size)) for target, count, size in pairs}

    first = ranks_of(fewest)
    smallest = measure(first)
    if smallest > budget:
        raise OptionError(
            f"a file of {budget:,} bytes does not hold rank {least * asked.multiple} of all {len(known)} modules",
            expected=f"The smallest possible has {smallest:,} bytes",
            todo="Ask for a larger size",
        )
    return _fitted(
        first,
        spend=lambda room: ranks_of(allocate(scores, prices, paid + room, least)),
        spare=lambda ranks: budget - measure(ranks),
        room=budget - smallest,
        step=min(prices),
    )


def _fitted(
    fewest: dict[Target, int],
    *,
    spend: Callable[[int], dict[Target, int]],
    spare: Callable[[Mapping[Target, int]], int],
    room: int,
    step: int,
) -> dict[Target, int]:
    """The ranks that the most bytes buy of which the file still fits.

    A file takes more than its values: digits of larger shapes, and what a configuration says of ranks that differ.
    How much that is shows only in the file that is measured.

    Args:
        fewest: The smallest ranks, which do fit.
        spend: The ranks for so many bytes more than the smallest take.
        spare: The bytes that are left of the budget with these ranks; negative where they do not fit.
        room: What to try first.
        step: Bytes of the cheapest rank, below which nothing is to be gained.
    """
    best, low, high = fewest, 0, -1
    while high < 0 or high - low >= step:
        found = spend(room)
        left = spare(found)
        if left >= 0:
            done = found == best or left < step
            best, low = found, room
            if done:
                break
        else:
            high = room
        room += left
        if high >= 0 and not low < room < high:
            room = (low + high) // 2
    return best


def _blocks(scores: Float64, multiple: int) -> Float64:
    """The scores of so many directions together: the root of their squares' sum."""
    if multiple == 1:
        return scores
    padded = np.pad(np.square(scores), (0, -scores.size % multiple))
    found: Float64 = np.sqrt(padded.reshape(-1, multiple).sum(axis=1))
    return found
