"""Modules brought to the grain of a layout: fused weights split, split ones fused, by naming and copying alone.

Splitting is exact and free: the parts share the right factor and take their rows of the left one. Fusing is exact
too: parts that share a right factor stack their left ones, others become blocks of a wider module, at the sum of
their ranks. Splitting what was fused so finds the zero columns, and gives the parts back as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import lcm
from typing import NamedTuple

from loratools import archs, kinds
from loratools.errors import LayoutError, LoraError, NameResolutionError, ShapeError, UnsupportedKindError
from loratools.formats import Format
from loratools.model import Adapter, Module, Rows, Target
from loratools.ops import _bits
from loratools.ops._cut import split
from loratools.ops._fuse import fuse
from loratools.ops._rows import a_name, settled


class Step(NamedTuple):
    """One module of the result, and what it is made of.

    Attributes:
        module: As it will be written; its tensors have the keys of the input, or none.
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
            steps += [Step(settled(module), (module,)) for module in members]
        else:
            steps += _pieces(members, wanted, notes)
    return Regrouped(tuple(steps), tuple(dict.fromkeys(notes)))


def grain(arch: str, component: str, path: str, form: Format) -> tuple[Rows | None, ...]:
    """The pieces in which a layout spells a weight; empty where no table says."""
    owner = archs.component(arch, component)
    if owner is None or owner.table is None:
        return form.split(path)
    return owner.table.pieces(path, owner.dialect(form.name, form.dialect))


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
                    keys=[a_name(other), a_name(module)],
                    todo="Keep one of them",
                )


def _pieces(members: Sequence[Module], wanted: Sequence[Rows | None], notes: list[str]) -> list[Step]:
    """Members of one weight in other pieces."""
    of = reduce(lcm, [rows.of for rows in (*(m.target.rows for m in members), *wanted) if rows], 1)
    held = [set(_bits.units(module.target.rows, of)) for module in members]
    reach = {unit for rows in wanted for unit in _bits.units(rows, of)}
    outside = [
        not units <= reach and not _is_zero(module, units - reach, of)
        for module, units in zip(members, held, strict=True)
    ]
    steps = [
        _beyond(module, len(units - reach), of)
        for module, units, out in zip(members, held, outside, strict=True)
        if out
    ]
    # The other modules of the weight have their names all the same.
    held = [units for units, out in zip(held, outside, strict=True) if not out]
    members = [module for module, out in zip(members, outside, strict=True) if not out]
    for rows in wanted if members else ():
        asked = _bits.units(rows, of)
        touching = [m for m, units in zip(members, held, strict=True) if not units.isdisjoint(asked)]
        if not touching:
            continue
        target = touching[0].target._replace(rows=rows)
        try:
            step = _piece(touching, target, wanted, of)
        except (ShapeError, UnsupportedKindError) as error:
            step = Step(settled(touching[0])._replace(target=target), tuple(touching), "split", problem=error)
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
    return Step(settled(module), (module,), "split", problem=problem)


def _first(module: Module, asked: Sequence[int], of: int) -> int:
    """Where a module's first row lies among the rows asked for."""
    mine = set(_bits.units(module.target.rows, of))
    return next(place for place, unit in enumerate(asked) if unit in mine)


def _piece(touching: Sequence[Module], target: Target, wanted: Sequence[Rows | None], of: int) -> Step | None:
    asked = _bits.units(target.rows, of)
    # In the order of their rows, whatever the order of the file: the way back then gives the same bits.
    touching = sorted(touching, key=lambda each: _first(each, asked, of))
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
