"""What an extraction holds of one tensor at most: the difference, and what a decomposition works with.

The constants are what the largest of several temporary values comes to, found by measuring; the shapes that they
multiply are those of the algorithms (``_extract_difference``, ``maths._krylov``, ``maths._gram_svd``).
"""

from __future__ import annotations

import math

from loratools.maths.rank import Rule
from loratools.maths.svd import widest_search
from loratools.ops._extract_difference import is_one_piece, is_plain
from loratools.ops._extract_tensor import FACTORS, NORM, Job
from loratools.tensors import DTYPES

_FLOAT32, _FLOAT64 = 4, 8  # bytes
_LITTLE = 10 << 20  # bytes: pieces of both sides, tiles of rows
# Of a block's width: the products that there is room for, and as many again while they are worked on.
_COLUMNS = 20
_GRAMS = 3  # a Gram matrix, LAPACK's own copy, and its eigenvectors
_IMAGES = 5  # of the matrix along its singular vectors, while they are made orthonormal


def memory_of(job: Job) -> int:
    """Bytes that a job holds at most.

    Of a search that finds nothing, and is followed by the exact way, what the search holds; where a rule does not say
    how many singular vectors it will keep, as if it were all that it may.
    """
    if job.task == NORM and is_plain(job):
        return _LITTLE
    size = math.prod(job.shape)
    held = _LITTLE + _difference(job, size)
    if job.task == FACTORS:
        return max(held, _LITTLE + _FLOAT32 * size + _decomposition(job))
    if job.task == NORM:
        return held
    return max(held, _LITTLE + (_FLOAT32 + 1 + DTYPES[job.store].bits // 8) * size)


def most_kept(job: Job) -> int:
    """The highest rank that a job's factors can have, a count."""
    rule, side = job.rule or Rule("rank", 1), min(job.matrix)
    if rule.kind == "rank":
        side = min(side, max(int(rule.value), rule.least))
    return side if rule.most is None else min(side, rule.most)


def _difference(job: Job, size: int) -> int:
    """Bytes of both sides of a matrix of so many values, and of what becomes of them."""
    if is_plain(job):
        return _FLOAT32 * size
    sides = (job.base, *job.tuned)
    stored = [DTYPES[side.weight.dtype].bits * math.prod(side.weight.shape) // 8 for side in sides]
    wide = _FLOAT64 if any(side.weight.dtype == "F64" for side in sides) else _FLOAT32
    after = _FLOAT32 * size if wide == _FLOAT64 else 0
    scaled = any(side.scale is not None or side.turned for side in sides)
    if not scaled and is_one_piece(job):  # subtracted where the tuned side lies, if that is as wide
        own = 0 if DTYPES[job.tuned[0].weight.dtype].bits == 8 * wide else wide * size
        return stored[0] + stored[1] + own + after
    largest = max(math.prod(piece.weight.shape) for piece in job.tuned)
    together = wide * size if is_one_piece(job) else wide * (size + largest)
    return stored[0] + max(stored[1:]) + wide * size + together + after


def _decomposition(job: Job) -> int:
    """Bytes beside the matrix while it is decomposed."""
    rule, sides = job.rule or Rule("rank", 1), job.matrix
    width = widest_search(min(sides), rule, job.method)
    search = _FLOAT32 * _COLUMNS * width * sum(sides)
    if width and rule.kind == "rank":
        return search
    exact = _FLOAT64 * (_GRAMS * min(sides) ** 2 + _IMAGES * most_kept(job) * max(sides))
    return max(search, exact)
