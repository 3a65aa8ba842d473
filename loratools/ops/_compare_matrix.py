"""One matrix that several inputs change: what their factors say of every pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from loratools.maths import overlap, tiles
from loratools.maths.lowrank import COMPUTE, Factors
from loratools.maths.overlap import Signs

# Below this share of the squared norms, a squared distance that was subtracted has lost too many digits.
_CLOSE = 1e-4


class Matrix(NamedTuple):
    """What an input brings to a matrix.

    Attributes:
        factors: On the device, in the store dtype or a wider one.
        scale: What multiplies their product, the input's weight included.
    """

    factors: Factors
    scale: float


class Shared(NamedTuple):
    """What the column spaces, or the row spaces, of all pairs share.

    Attributes:
        squares: (n, n) float64, the sum of the squared cosines of their principal angles.
        expected: (n, n) float64, what that would be for random spaces of the same dimensions.
        angles: (n, n) float64, the smallest angle in degrees; infinite where one is empty or it was not asked for.
    """

    squares: torch.Tensor
    expected: torch.Tensor
    angles: torch.Tensor


class Details(NamedTuple):
    """What spaces and signs say of all pairs.

    Attributes:
        ranks: (n,) float64, numerical ranks.
        columns: Of the column spaces.
        rows: Of the row spaces.
        signs: Sums over all rows, as far as they are known.
    """

    ranks: torch.Tensor
    columns: Shared
    rows: Shared
    signs: Signs

    @property
    def smaller(self) -> torch.Tensor:
        """(n, n) float64, the smaller rank of each pair, in shares of which spaces overlap; 0 where one is zero."""
        return torch.minimum(self.ranks[:, None], self.ranks[None, :])


class MatrixFigures(NamedTuple):
    """What was found on one matrix, or on several that are the blocks of a block-diagonal one.

    Attributes:
        gram: (n, n) float64, inner products.
        squares: (n, n) float64, squared distances.
        details: None where they were not asked for.
    """

    gram: torch.Tensor
    squares: torch.Tensor
    details: Details | None


def compare_matrix(
    matrices: Sequence[Matrix], *, name: str, detailed: bool, rows: int, angles: bool
) -> MatrixFigures:
    """Compare what several inputs bring to one matrix.

    Args:
        matrices: One of each input, all of one shape, finite.
        name: The matrix's, by which rows are drawn.
        detailed: Whether spaces and signs are compared too.
        rows: How many rows the sign conflict rests on, a count; 0 for all.
        angles: Whether the smallest principal angles are wanted, each of which costs a decomposition.
    """
    parts, scales = [each.factors for each in matrices], [each.scale for each in matrices]
    if not detailed:
        gram = overlap.gram(parts, scales)
        return MatrixFigures(gram, _squares(gram, parts, scales), None)
    spaces = [overlap.space_of(part) for part in parts]
    plain = [space.factors for space in spaces]
    gram = overlap.gram(plain, scales)
    details = Details(
        torch.tensor([space.rank for space in spaces], dtype=COMPUTE),
        _shared([space.columns for space in spaces], angles=angles),
        _shared([space.rows for space in spaces], angles=angles),
        _signs(name, plain, scales, rows),
    )
    return MatrixFigures(gram, _squares(gram, plain, scales), details)


def block_diagonal(blocks: Sequence[MatrixFigures]) -> MatrixFigures:
    """What holds of matrices whose blocks these are: fused experts are compared as a whole.

    Inner products, squared distances, ranks and sums over elements add up; the principal angles of such matrices are
    those of all their blocks.
    """
    gram = torch.stack([block.gram for block in blocks]).sum(dim=0)
    squares = torch.stack([block.squares for block in blocks]).sum(dim=0)
    details = [block.details for block in blocks if block.details is not None]
    return MatrixFigures(gram, squares, _joined(details) if details else None)


def _joined(blocks: Sequence[Details]) -> Details:
    return Details(
        torch.stack([block.ranks for block in blocks]).sum(dim=0),
        _joined_spaces([block.columns for block in blocks]),
        _joined_spaces([block.rows for block in blocks]),
        Signs(
            torch.stack([block.signs.opposite for block in blocks]).sum(dim=0),
            torch.stack([block.signs.total for block in blocks]).sum(dim=0),
        ),
    )


def _joined_spaces(blocks: Sequence[Shared]) -> Shared:
    return Shared(
        torch.stack([block.squares for block in blocks]).sum(dim=0),
        torch.stack([block.expected for block in blocks]).sum(dim=0),
        torch.stack([block.angles for block in blocks]).amin(dim=0),
    )


def _squares(gram: torch.Tensor, parts: Sequence[Factors], scales: Sequence[float]) -> torch.Tensor:
    """The squared distances of all pairs, those of nearly equal matrices without cancellation."""
    norms = gram.diagonal()
    sums = norms[:, None] + norms[None, :]
    found = (sums - 2.0 * gram).clamp(min=0.0).fill_diagonal_(0.0)
    for first, second in torch.nonzero(torch.triu(found < _CLOSE * sums, diagonal=1)).tolist():
        scaled = scales[first], scales[second]
        exact = overlap.difference(parts[first], parts[second], scaled) ** 2
        found[first, second] = found[second, first] = exact
    return found


def _shared(bases: Sequence[torch.Tensor], *, angles: bool) -> Shared:
    widths = torch.tensor([basis.shape[1] for basis in bases], dtype=COMPUTE)
    smallest = torch.full((len(bases), len(bases)), math.inf, dtype=COMPUTE)
    if angles:
        for second, other in enumerate(bases):
            for first, one in enumerate(bases[:second]):
                found = overlap.principal_angles(one, other)
                if len(found):
                    smallest[first, second] = smallest[second, first] = math.degrees(float(found[0]))
    expected = torch.outer(widths, widths) / max(1, len(bases[0]))
    return Shared(overlap.shared_squares(bases), expected, smallest)


def _signs(name: str, parts: Sequence[Factors], scales: Sequence[float], count: int) -> Signs:
    """The sums of the sign conflict for every pair: over all rows, or over some that stand for all."""
    height = parts[0].shape[0]
    if count:
        chosen = [overlap.sampled_rows(name, height, count)]
    else:
        chosen = list(torch.split(torch.arange(height), tiles.tile_height(parts[0].shape)))
    opposite = torch.zeros(len(parts), len(parts), dtype=COMPUTE)
    total = torch.zeros_like(opposite)
    for rows in chosen:
        tile = [
            (part.up[rows.to(part.up.device)] @ part.down) * scale
            for part, scale in zip(parts, scales, strict=True)
        ]
        found = overlap.sign_sums(tile)
        opposite += found.opposite
        total += found.total
    share = height / max(1, sum(len(rows) for rows in chosen))
    return Signs(opposite * share, total * share)
