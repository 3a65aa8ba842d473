"""The papers' algorithms on every element of ΔW, as plain as they are written.

Every reference goes through the elements of the full matrices wᵢ·ΔWᵢ one by one, in float64 and plain Python. Random
masks are made of the same draws as the methods', taken for the whole matrix at once.
"""

from __future__ import annotations

import itertools
import math

import torch

from loratools.maths.draws import key_of, uniform
from loratools.maths.lowrank import COMPUTE
from loratools.methods import Options


def task_vectors(parts):
    return [part.weight * part.scale * part.factors.delta() for part in parts]


def by_magnitude(values):
    """Positions by descending magnitude, the first of equal ones first."""
    return sorted(range(len(values)), key=lambda at: (-abs(values[at]), at))


def count(fraction, numel):
    return math.floor(fraction * numel + 0.5)


def kept_only(vector, places):
    flat = vector.flatten().tolist()
    kept = [0.0] * len(flat)
    for at in places:
        kept[at] = flat[at]
    return torch.tensor(kept, dtype=COMPUTE).view(vector.shape)


def trim(vector, chosen, source):
    keep = max(1, count(chosen.density, vector.numel()))
    return kept_only(vector, by_magnitude(vector.flatten().tolist())[:keep])


def crumbs(vector, chosen, source):
    """Order everything; drop the top, keep the next, drop the rest."""
    numel = vector.numel()
    keep = max(1, count(chosen.density, numel))
    drop = min(count(chosen.gamma, numel), numel - keep)
    return kept_only(vector, by_magnitude(vector.flatten().tolist())[drop : drop + keep])


def draws(vector, chosen, source):
    return uniform(key_of(chosen.seed, chosen.key, source), 0, tuple(vector.shape)).tolist()


def dare(vector, chosen, source):
    drawn = draws(vector, chosen, source)
    found = torch.zeros_like(vector)
    for row, column in itertools.product(*map(range, vector.shape)):
        if drawn[row][column] < chosen.density:
            found[row, column] = vector[row, column] / chosen.density
    return found


def magprune(vector, chosen, source):
    """Rank each row; keep with probabilities by rank, ε apart from first to last; divide by them."""
    drawn = draws(vector, chosen, source)
    found = torch.zeros_like(vector)
    width = vector.shape[1]
    spread = min(chosen.epsilon, 2 * chosen.density, 2 - 2 * chosen.density)
    for row in range(vector.shape[0]):
        from_smallest = by_magnitude(vector[row].tolist())[::-1]
        for rank, column in enumerate(from_smallest):
            lowest = chosen.density - spread / 2
            probability = lowest + spread / width * (rank + 0.5)
            if drawn[row][column] < probability:
                found[row, column] = vector[row, column] / probability
    return found


def add(vectors, chosen):
    return sum(vectors, torch.zeros_like(vectors[0]))


def sign(value):
    return (value > 1e-12) - (value < -1e-12)


def elect(vectors, chosen):
    """Disjoint merge: the mean of the nonzero values that have the elected sign."""
    found = torch.zeros_like(vectors[0])
    for row, column in itertools.product(*map(range, found.shape)):
        values = [float(vector[row, column]) for vector in vectors]
        votes = [sign(value) for value in values] if chosen.majority == "frequency" else values
        elected = sign(sum(votes))
        agreeing = [value for value in values if value * elected > 0]
        found[row, column] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return found


STEPS = {
    "magnitude": (trim, add),
    "ties": (trim, elect),
    "breadcrumbs": (crumbs, add),
    "breadcrumbs-ties": (crumbs, elect),
    "dare-linear": (dare, add),
    "dare-ties": (dare, elect),
    "della-linear": (magprune, add),
    "della": (magprune, elect),
}


def select_calculate_erase(parts, chosen):
    vectors = [vector.flatten().tolist() for vector in task_vectors(parts)]
    numel = len(vectors[0])
    means = [sum(values) / len(values) for values in zip(*vectors, strict=True)]
    variance = [
        sum((value - mean) ** 2 for value in values) / len(values)
        for values, mean in zip(zip(*vectors, strict=True), means, strict=True)
    ]
    keep = set(by_magnitude(variance)[: max(1, count(chosen.density, numel))]) if len(parts) > 1 else None
    if keep is not None:
        vectors = [[value if at in keep else 0.0 for at, value in enumerate(vector)] for vector in vectors]
    squares = [sum(value * value for value in vector) for vector in vectors]
    shares = [square / sum(squares) for square in squares]
    found = []
    for values in zip(*vectors, strict=True):
        elected = sign(sum(values))
        agreeing = [
            (share, value) for share, value in zip(shares, values, strict=True) if value * elected > 0
        ]
        weight = sum(share for share, _ in agreeing)
        found.append(sum(share * value for share, value in agreeing) / weight if agreeing else 0.0)
    return chosen.lam * torch.tensor(found, dtype=COMPUTE).view(parts[0].factors.shape)


def paper(name, parts, **given):
    chosen = Options(**given)
    if name == "sce":
        return select_calculate_erase(parts, chosen)
    thin, join = STEPS[name]
    deltas = [part.factors.delta() for part in parts]
    thinned = [
        part.weight * part.scale * thin(delta, chosen, part.source)
        for part, delta in zip(parts, deltas, strict=True)
    ]
    return chosen.lam * join(thinned, chosen)
