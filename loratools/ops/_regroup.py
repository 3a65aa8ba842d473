"""Modules brought to the grain of a layout: fused weights split, split ones fused, by naming and copying alone.

Splitting is exact and free: the parts share the right factor and take their rows of the left one. Fusing is exact
too: parts that share a right factor stack their left ones, others become blocks of a wider module, at the sum of
their ranks. Splitting what was fused so finds the zero columns, and gives the parts back as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import lcm
from typing import NamedTuple

from loratools import archs, kinds
from loratools.errors import LayoutError, LoraError, NameResolutionError, ShapeError, UnsupportedKindError
from loratools.formats import Format
from loratools.kinds import oft
from loratools.model import Adapter, Module, Rows, Target
from loratools.ops import _bits, _scale
from loratools.tensors import TensorRef

# Kernels' cores of Tucker forms: of several parts' there is no block-diagonal form among the factors.
_CORES = frozenset({"mid", "hada_t1", "hada_t2"})
# LyCORIS' trained multiplier: the reader has multiplied it into the scale.
_IN_SCALE = "scalar"


class Step(NamedTuple):
    """One module of the result, and what it is made of.

    Attributes:
        module: As it will be written; its tensors have no names yet.
        sources: The input's modules that it is made of.
        fate: "moved", "split" or "fused".
        rounded: Whether values were computed, so that they may have been rounded.
        problem: Why it cannot be made, or None.
    """

    module: Module
    sources: tuple[Module, ...]
    fate: str = "moved"
    rounded: bool = False
    problem: LoraError | None = None


class Regrouped(NamedTuple):
    """All modules at a layout's grain.

    Attributes:
        steps: In order.
        notes: What the caller should know.
    """

    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()


def regroup(adapter: Adapter, form: Format) -> Regrouped:
    """The adapter's modules in the pieces in which a layout spells their weights.

    Raises:
        NameResolutionError: Two modules of the adapter change the same rows of a weight.
    """
    by_path: dict[tuple[str, str], list[Module]] = {}
    for module in adapter.modules.values():
        by_path.setdefault((module.target.component, module.target.path), []).append(module)
    steps: list[Step] = []
    notes: list[str] = []
    for (component, path), members in by_path.items():
        if len(members) > 1:
            _refuse_overlap(members, adapter.path)
        wanted = grain(adapter.arch, component, path, form)
        present = [module.target.rows for module in members]
        if not wanted and not form.parts and present != [None]:
            wanted = (None,)
        if not wanted or set(present) <= set(wanted):
            steps += [Step(nameless(module), (module,)) for module in members]
        else:
            steps += _pieces(members, wanted, notes)
    return Regrouped(tuple(steps), tuple(dict.fromkeys(notes)))


def grain(arch: str, component: str, path: str, form: Format) -> tuple[Rows | None, ...]:
    """The pieces in which a layout spells a weight; empty where no table says."""
    table = archs.get(arch)
    owner = next((row for row in table.components if row.name == component), None)
    if owner is None or owner.table is None:
        return ()
    return table.pieces(component, path, owner.dialect(form.name, form.dialect))


def nameless(module: Module) -> Module:
    """The module with tensors that have lost the keys of their file, and without what its scale says already."""
    return module._replace(
        factors={role: ref.renamed("") for role, ref in module.factors.items() if role != _IN_SCALE},
        alpha_tensor=module.alpha_tensor.renamed("") if module.alpha_tensor is not None else None,
        magnitude=module.magnitude.renamed("") if module.magnitude is not None else None,
    )


def _refuse_overlap(members: Sequence[Module], path: str) -> None:
    of = reduce(lcm, [module.target.rows.of for module in members if module.target.rows], 1)
    owner: dict[int, Module] = {}
    for module in members:
        for unit in _bits.units(module.target.rows, of):
            other = owner.setdefault(unit, module)
            if other is not module:
                raise NameResolutionError(
                    f"two modules change the same rows of {module.target.path}",
                    path=path or None,
                    keys=[_a_name(other), _a_name(module)],
                    todo="Keep one of them",
                )


def _a_name(module: Module) -> str:
    return next((ref.name for ref in module.factors.values() if ref.name), str(module.target))


def _pieces(members: Sequence[Module], wanted: Sequence[Rows | None], notes: list[str]) -> list[Step]:
    """Members of one weight in other pieces."""
    of = reduce(lcm, [rows.of for rows in (*(m.target.rows for m in members), *wanted) if rows], 1)
    held = [set(_bits.units(module.target.rows, of)) for module in members]
    reach = {unit for rows in wanted for unit in _bits.units(rows, of)}
    steps = [
        _beyond(module, len(units - reach), of)
        for module, units in zip(members, held, strict=True)
        if not units <= reach and not _is_zero(module, units - reach, of)
    ]
    if steps:
        return steps
    for rows in wanted:
        asked = _bits.units(rows, of)
        touching = [m for m, units in zip(members, held, strict=True) if not units.isdisjoint(asked)]
        if not touching:
            continue
        target = touching[0].target._replace(rows=rows)
        try:
            step = _piece(touching, target, wanted, of)
        except (ShapeError, UnsupportedKindError) as error:
            step = Step(
                nameless(touching[0])._replace(target=target), tuple(touching), "split", problem=error
            )
        if step is None:
            notes.append(f"{target} is zero in its fused weight and is left out")
            continue
        missing = len(set(asked) - set().union(*held))
        if missing:
            notes.append(f"{target.path}: {missing} of {of} shares of its rows have no module; they are zero")
        steps.append(step)
    return steps


def _is_zero(module: Module, units: set[int], of: int) -> bool:
    """Whether a module leaves some of its rows as they are."""
    axes = kinds.get(module.kind).row_axes(module.factors)
    if not axes or module.magnitude is not None:
        return False
    held = _bits.units(module.target.rows, of)
    places = [place for place, unit in enumerate(held) if unit in units]
    return all(
        module.factors[role].shape[axis] % len(held) == 0
        and not _bits.support(module.factors[role], axis, [places], len(held)).any()
        for role, axis in axes.items()
    )


def _beyond(module: Module, shares: int, of: int) -> Step:
    """A module some of whose rows the layout has no name for."""
    problem = LayoutError(f"it has no name for {shares} of {of} shares of the rows of {module.target.path}")
    return Step(nameless(module), (module,), "split", problem=problem)


def _piece(touching: Sequence[Module], target: Target, wanted: Sequence[Rows | None], of: int) -> Step | None:
    asked = _bits.units(target.rows, of)
    parts = [split(module, target, wanted, of) for module in touching]
    # What is left of each: a part may be zero in a module that was fused before.
    found = [(part, module) for part, module in zip(parts, touching, strict=True) if part is not None]
    if not found:
        return None
    sources = tuple(module for _, module in found)
    only = found[0][0]
    if len(found) == 1 and set(_bits.units(only.target.rows, of)) >= set(asked):
        return Step(only._replace(target=target), sources, "split")
    fused, rounded = fuse([part for part, _ in found], target, of)
    return Step(fused, sources, "fused", rounded)


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
        return nameless(module)
    axes = _row_axes(module, len(held))
    places = [held.index(unit) for unit in asked]
    factors = {role: ref.renamed("") for role, ref in module.factors.items()}
    rank = module.rank
    if len(asked) < len(held):
        columns = _own_columns(module, axes, held, asked, wanted, of)
        if columns is not None:
            if not columns:
                return None
            factors = _with_columns(module, axes, columns)
            rank = len(columns)
    for role, axis in axes.items():
        factors[role] = _bits.taken(factors[role], axis, places, len(held))
    shape = module.shape
    if shape is not None:
        shape = (shape[0] // len(held) * len(asked), *shape[1:])
    magnitude = module.magnitude
    if magnitude is not None:
        magnitude = _bits.taken(_flat(magnitude), 0, places, len(held))
    alpha = module.alpha_tensor if rank == module.rank else None
    stated = module.alpha if rank == module.rank else None
    return nameless(
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


def _partial(target: Target, units: Sequence[int], of: int) -> Target:
    return target._replace(rows=Rows(tuple((unit, unit + 1) for unit in units), of))


def _flat(magnitude: TensorRef) -> TensorRef:
    return magnitude.reshaped((magnitude.numel,))


def _row_axes(module: Module, parts: int) -> Mapping[str, int]:
    """Along which axis each factor follows the weight's rows.

    Raises:
        ShapeError: They do not fall on whole shares.
        UnsupportedKindError: The rows cannot be taken apart.
    """
    kind = kinds.get(module.kind)
    axes = kind.row_axes(module.factors)
    keys = [ref.name for _, ref in module.tensors() if ref.name]
    if axes is None:
        raise UnsupportedKindError(
            f"{module.target}: the rows of a {kind.title} module cannot be taken apart",
            keys=keys,
            todo="Turn it into LoRA with --as lora",
        )
    if module.kind == "oft" and oft.constraint(module) > 0:
        raise UnsupportedKindError(
            f"{module.target}: the constraint on its rotation is one of all rows together",
            keys=keys,
            todo="Turn it into LoRA with --as lora --base",
        )
    if module.magnitude is not None and module.magnitude_axis == "in":
        raise UnsupportedKindError(
            f"{module.target}: its magnitude per input is that of all rows together",
            keys=keys,
            todo="Turn it into LoRA with --as lora --base",
        )
    for role, axis in axes.items():
        if module.factors[role].shape[axis] % parts:
            raise ShapeError(
                f"{module.target}: {module.factors[role].shape[axis]} rows of its {role} cannot be parted into "
                f"{parts} equal shares",
                keys=keys,
                todo="Turn it into LoRA with --as lora" if module.kind != "lora" else "",
            )
    return axes


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
    if not products or _CORES & module.factors.keys():
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


def fuse(parts: Sequence[Module], target: Target, of: int) -> tuple[Module, bool]:
    """Modules of several parts of a weight as one, zero where there is no part.

    Args:
        parts: Of one kind; their rows do not overlap, and lie in the target's.
        target: The piece that they make up.
        of: How many shares of rows are counted in.

    Returns:
        The module, and whether values were computed to bring the parts to one scale or dtype.

    Raises:
        ShapeError: The parts' inputs differ.
        UnsupportedKindError: The kind cannot be fused, or the parts differ in what they would share.
    """
    first = parts[0]
    keys = [_a_name(part) for part in parts]
    kind = kinds.get(first.kind)
    if any(part.kind != first.kind or part.factors.keys() != first.factors.keys() for part in parts):
        raise UnsupportedKindError(
            f"{target}: its parts are of different kinds", keys=keys, todo="Use --as lora"
        )
    if len({part.shape[1:] for part in parts if part.shape}) > 1:
        raise ShapeError(f"{target}: its parts have different inputs", keys=keys)
    axes = [_row_axes(part, len(_bits.units(part.target.rows, of))) for part in parts]
    alike, rounded = _scale.alike(parts)
    asked = _bits.units(target.rows, of)
    shares = [[asked.index(unit) for unit in _bits.units(part.target.rows, of)] for part in parts]
    factors = _shared(alike, axes, keys, target)
    rank = first.rank
    if kind.products:
        starts, rank = _columns(alike, kind.products)
        for left, right in kind.products:
            blocks = [
                _bits.Block(part.factors[left], share, start)
                for part, share, start in zip(alike, shares, starts, strict=True)
            ]
            factors[left] = _bits.assembled(blocks, axes[0][left], len(asked), rank)
            new = [part for number, part in enumerate(alike) if starts.index(starts[number]) == number]
            factors[right] = _bits.stacked([part.factors[right] for part in new])
    paired = {role for pair in kind.products for role in pair}
    for role, axis in axes[0].items():
        if role not in paired:
            blocks = [
                _bits.Block(part.factors[role], share) for part, share in zip(alike, shares, strict=True)
            ]
            factors[role] = _bits.assembled(blocks, axis, len(asked))
    magnitude = _fused_magnitude(alike, shares, len(asked), target)
    order = {role: factors[role] for role in first.factors}
    rows = (first.shape or (0,))[0] // len(shares[0]) * len(asked)
    shape = (rows, *first.shape[1:]) if first.shape else None
    module = alike[0]._replace(target=target, factors=order, rank=rank, shape=shape, magnitude=magnitude)
    keep = rank == first.rank
    module = module._replace(
        alpha=first.alpha if keep else None, alpha_tensor=first.alpha_tensor if keep else None
    )
    return nameless(module), rounded


def _columns(parts: Sequence[Module], products: Sequence[tuple[str, str]]) -> tuple[list[int], int]:
    """Where each part's columns begin: parts with the same right factors share theirs. And how many there are."""
    starts: list[int] = []
    rank = 0
    for number, part in enumerate(parts):
        same = next((other for other in range(number) if _share(parts[other], part, products)), None)
        starts.append(rank if same is None else starts[same])
        if same is None:
            rank += part.factors[products[0][1]].shape[0]
    return starts, rank


def _share(one: Module, other: Module, products: Sequence[tuple[str, str]]) -> bool:
    return all(_bits.same_bits(one.factors[right], other.factors[right]) for _, right in products)


def _shared(
    parts: Sequence[Module], axes: Sequence[Mapping[str, int]], keys: Sequence[str], target: Target
) -> dict[str, TensorRef]:
    """The factors that serve all rows alike, which the parts have to agree on.

    Raises:
        UnsupportedKindError: They do not.
    """
    first = parts[0]
    paired = {role for pair in kinds.get(first.kind).products for role in pair}
    shared: dict[str, TensorRef] = {}
    for role, ref in first.factors.items():
        if role in axes[0] or role in paired:
            continue
        if not all(_bits.same_bits(ref, part.factors[role]) for part in parts[1:]):
            raise UnsupportedKindError(
                f"{target}: its parts differ in {role}, of which the fused weight has one",
                keys=keys,
                todo="Turn it into LoRA with --as lora",
            )
        shared[role] = ref
    products = kinds.get(first.kind).products
    apart = any(not _share(first, part, products) for part in parts[1:])
    if _CORES & first.factors.keys() and apart:
        raise UnsupportedKindError(
            f"{target}: parts in Tucker form cannot be fused unless they share their right factors",
            keys=keys,
            todo="Turn it into LoRA with --as lora",
        )
    return shared


def _fused_magnitude(
    parts: Sequence[Module], shares: Sequence[Sequence[int]], of: int, target: Target
) -> TensorRef | None:
    """The parts' magnitudes as one.

    Raises:
        UnsupportedKindError: A part of the weight has none: it would be that of the base weight.
    """
    if all(part.magnitude is None for part in parts):
        return None
    covered = sum(len(share) for share in shares)
    if covered < of or any(part.magnitude is None for part in parts):
        raise UnsupportedKindError(
            f"{target}: a part of this weight has no magnitude, and the whole one needs the base weight's norms",
            keys=[_a_name(part) for part in parts],
            todo="Turn it into LoRA with --as lora --base",
        )
    blocks = [
        _bits.Block(_flat(part.magnitude), share)
        for part, share in zip(parts, shares, strict=True)
        if part.magnitude is not None
    ]
    return _bits.assembled(blocks, 0, of)
