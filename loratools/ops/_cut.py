"""Parts of fused modules: their rows, and of modules that were fused of parts their own ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratools import kinds
from loratools.model import Module, Rows, Target
from loratools.ops import _bits
from loratools.ops._rows import CORES, flat, row_axes, settled
from loratools.tensors import TensorRef


def split(module: Module, target: Target, wanted: Sequence[Rows | None], of: int) -> Module | None:
    """The part of a module that lies in a target's rows, in the target's order of rows.

    Args:
        module: Changes some of these rows, and maybe others.
        target: The piece.
        wanted: All pieces of the weight, among which zero columns are looked for.
        of: How many shares of rows are counted in.

    Returns:
        None where the module was fused of parts, none of which lies here.

    Raises:
        ShapeError: The rows do not fall on whole shares.
        UnsupportedKindError: The kind's rows cannot be taken apart.
    """
    held = _bits.units(module.target.rows, of)
    mine = set(held)
    asked = [unit for unit in _bits.units(target.rows, of) if unit in mine]
    if asked == held:
        return settled(module)
    axes = row_axes(module, len(held))
    places = [held.index(unit) for unit in asked]
    factors = {role: ref.renamed("") for role, ref in module.factors.items()}
    rank = module.rank
    if len(asked) < len(held):
        columns = _own_columns(module, axes, held, asked, wanted, of)
        if columns is not None:
            if not columns and not _has_more(module):
                return None
            # What lies beside the factors is the piece's own: it stays, with one rank of zeros.
            columns = columns or [0]
            factors = _with_columns(module, axes, columns)
            rank = len(columns)
    for role, axis in axes.items():
        factors[role] = _bits.taken(factors[role], axis, places, len(held))
    shape = module.shape
    if shape is not None:
        shape = (shape[0] // len(held) * len(asked), *shape[1:])
    magnitude = module.magnitude
    if magnitude is not None:
        magnitude = _bits.taken(flat(magnitude), 0, places, len(held))
    alpha = module.alpha_tensor if rank == module.rank else None
    stated = module.alpha if rank == module.rank else None
    return settled(
        module._replace(
            target=target if len(asked) == len(_bits.units(target.rows, of)) else _partial(target, asked, of),
            factors=factors,
            rank=rank,
            shape=shape,
            magnitude=magnitude,
            alpha_tensor=alpha,
            alpha=stated,
        )
    )


def _has_more(module: Module) -> bool:
    """Whether something lies beside the factors that are multiplied: a magnitude, a bias, a difference."""
    paired = {role for pair in kinds.get(module.kind).products for role in pair}
    return module.magnitude is not None or bool(module.factors.keys() - paired - {"scalar"})


def _partial(target: Target, units: Sequence[int], of: int) -> Target:
    return target._replace(rows=Rows(tuple((unit, unit + 1) for unit in units), of))


def _own_columns(
    module: Module,
    axes: Mapping[str, int],
    held: Sequence[int],
    asked: Sequence[int],
    wanted: Sequence[Rows | None],
    of: int,
) -> list[int] | None:
    """The columns of a fused module's left factors that are a piece's own; None where all pieces share them."""
    products = kinds.get(module.kind).products
    if not products or CORES & module.factors.keys():
        return None
    mine = set(held)
    pieces = [[held.index(unit) for unit in _bits.units(rows, of) if unit in mine] for rows in wanted]
    pieces = [piece for piece in pieces if piece]
    here = pieces.index([held.index(unit) for unit in asked])
    found = None
    for left, _ in products:
        table = _bits.support(module.factors[left], axes[left], pieces, len(held))
        whole = table.all(axis=0) | ~table.any(axis=0)
        if whole.all():
            return None
        columns = _assigned(table.tolist(), here)
        # The pairs of a LoHa have one rank in their files: they were fused alike, or not at all.
        if found is not None and columns != found:
            return None
        found = columns
    return found


def _assigned(table: Sequence[Sequence[bool]], here: int) -> list[int]:
    """The columns of one piece: those that are not zero there, and the zero ones that lie among its own.

    Parts that were fused follow each other, so that a column that is zero everywhere, a rank never trained, is of
    the part whose columns surround it, or that ends before it.
    """
    count, rank = len(table), len(table[0])
    share, rest = divmod(rank, count)
    blocks = [
        [place * share <= column < (place + 1) * share for column in range(rank)] for place in range(count)
    ]
    even = not rest and all(
        within or not used
        for row, block in zip(table, blocks, strict=True)
        for used, within in zip(row, block, strict=True)
    )
    if even and any(table[here]):
        return [column for column in range(rank) if blocks[here][column]]
    columns = []
    last: set[int] = {next(piece for piece in range(count) if any(table[piece]))}
    for column in range(rank):
        users = {piece for piece in range(count) if table[piece][column]}
        last = users or last
        if here in last:
            columns.append(column)
    return columns if any(table[here]) else []


def _with_columns(module: Module, axes: Mapping[str, int], columns: Sequence[int]) -> dict[str, TensorRef]:
    """The factors of a piece that has only some of a fused module's ranks."""
    factors = {role: ref.renamed("") for role, ref in module.factors.items()}
    for left, right in kinds.get(module.kind).products:
        factors[left] = _bits.chosen(factors[left], 1 - axes[left], columns)
        factors[right] = _bits.chosen(factors[right], 0, columns)
    return factors
