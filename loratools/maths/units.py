"""Rank-one units of several products, put into groups of similar ones and each group joined into one unit.

A unit is one singular direction, √σ·u and √σ·v, as the vector x = [√σ·u; √σ·v]. (u, v) and (−u, −v) are the same
unit, so groups are found up to sign: the distance of x from a centre c is the smaller of ‖x − c‖ and ‖x + c‖. Only
inner products of units are needed for that, an R x R matrix for R units of any length.

Lloyd's algorithm with the starts of Arthur and Vassilvitskii: "k-means++: the advantages of careful seeding", 2007;
of several starts the result with the least sum of squared distances is taken.
"""

from __future__ import annotations

import torch

from loratools.maths.draws import uniform
from loratools.maths.lowrank import COMPUTE

_STARTS = 16
_ITERATIONS = 100
# Units closer than this, relative to the longest one's square, are the same one.
_SAME = 2.0**-40


def grouped(gram: torch.Tensor, count: int, key: int) -> torch.Tensor:
    """Groups of units by k-means up to sign.

    Args:
        gram: (R, R) inner products of the units, float64. The signs of units that are orthogonal to each other are
            left as they are.
        count: The number of groups, at least 1; there are fewer where there are fewer different units.
        key: Of the draws for the starts, from ``draws.key_of``.

    Returns:
        (R, k): ±1 where a unit belongs to a group, with its sign there, else 0. No group is empty.
    """
    starts = _started(gram, uniform(key, 0, (_STARTS, count), gram.device))
    found = _settled(gram, starts)
    losses = _distances(gram, found).min(dim=2).values.sum(dim=1)
    best = found[int(losses.argmin())]
    return best[:, best.any(dim=0)]


def upright(units: torch.Tensor) -> torch.Tensor:
    """Units with the sign that makes the largest entry of each positive: decompositions choose it by rounding.

    Args:
        units: (R, out + in).
    """
    largest = units.gather(1, units.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -units, units)


def joined(units: torch.Tensor, members: torch.Tensor, out: int, signs: torch.Tensor) -> torch.Tensor:
    """One unit for each group: its mean, as large as its members are on average.

    The mean of units that point apart is smaller than they are. How large a unit is, its largest entry says: ‖x‖_∞, the
    norm of LoRA-LEGO's parameter reweighting.

    Args:
        units: (R, out + in) float64.
        members: From :func:`grouped`.
        out: How many leading entries of a unit belong to its left vector.
        signs: (R,) ±1, whether a unit's product counts positively or negatively.

    Returns:
        (k, out + in): c scaled so that ‖c‖_∞ is the mean of the members' ‖x‖_∞. Its left half is multiplied by
        Σ ±‖x‖² / Σ ‖x‖² over the members, which is 1 where all count positively and 0 where they cancel.
    """
    sizes = members.abs().sum(dim=0)
    centres = members.T @ units / sizes[:, None]
    target = members.abs().T @ units.abs().amax(dim=1) / sizes
    largest = centres.abs().amax(dim=1)
    centres = centres * torch.where(largest > 0, target / largest, 0.0)[:, None]
    squares = members.abs() * units.square().sum(dim=1)[:, None]
    share = (squares * signs[:, None]).sum(dim=0) / squares.sum(dim=0).clamp(min=torch.finfo(COMPUTE).tiny)
    return torch.cat([centres[:, :out] * share[:, None], centres[:, out:]], dim=1)


def _started(gram: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Single units as groups, each drawn with a probability that grows with its squared distance from the others.

    Args:
        gram: (R, R).
        draws: (starts, count) in [0, 1).

    Returns:
        (starts, R, count), with empty groups where no unit is left that differs from those drawn.
    """
    squares = gram.diagonal()
    same = _SAME * float(squares.max())
    distances = squares.expand(draws.shape[0], -1)
    members = gram.new_zeros(draws.shape[0], gram.shape[0], draws.shape[1])
    for step in range(draws.shape[1]):
        total = distances.cumsum(1)
        goal = draws[:, step, None] * total[:, -1:]
        place = torch.searchsorted(total, goal, right=True).clamp(max=gram.shape[0] - 1)
        found = (total[:, -1:] > 0.0) | (step == 0)
        members[:, :, step].scatter_(1, place, found.to(gram))
        beside = squares + squares[place] - 2.0 * gram[place[:, 0]].abs()
        distances = torch.minimum(distances, torch.where(beside > same, beside, 0.0))
    return members


def _settled(gram: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Lloyd's iteration of all starts until no unit changes its group; one that loses its last unit stays empty."""
    # Of inner products that are 0 the sign is that of rounding errors.
    opposed = _SAME * float(gram.diagonal().max())
    for _ in range(_ITERATIONS):
        nearest = _distances(gram, members).argmin(dim=2, keepdim=True)
        sign = torch.where((gram @ members).gather(2, nearest) < -opposed, -1.0, 1.0).to(gram)
        after = torch.zeros_like(members).scatter_(2, nearest, sign)
        if torch.equal(after, members):
            break
        members = after
    return members


def _distances(gram: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Squared distances of every unit from every group's centre, none below 0, infinite from empty groups.

    Args:
        gram: (R, R).
        members: (starts, R, k).

    Returns:
        (starts, R, k).
    """
    sizes = members.abs().sum(dim=1, keepdim=True)
    means = members / sizes.clamp(min=1.0)
    inner = gram @ means
    squares = (means * inner).sum(dim=1, keepdim=True)
    found = (gram.diagonal()[:, None] - 2.0 * inner.abs() + squares).clamp(min=0.0)
    return torch.where(sizes > 0, found, torch.inf)
