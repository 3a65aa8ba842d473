"""Inputs of a merge of which some adapt a fused weight and others its parts: all brought to one set of names.

The base model's names decide where it is given, and its family says which rows are whose. Without it, the names that
runtimes give the fused weights of models that keep them apart (qkv_proj, gate_up_proj) say so, and the parts' heights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratools.errors import LayoutError, ShapeError
from loratools.model import Adapter, Module, Rows, Target
from loratools.ops import _cut, _fused_rows
from loratools.ops._extras_base import BaseModel
from loratools.ops._fused_rows import Part

Path = tuple[str, str]
"""A component, and a module's path in it."""


def alike(adapters: Sequence[Adapter], base: BaseModel | None) -> list[Adapter]:
    """The inputs with fused weights and their parts under one set of names, where some have it so and others so.

    Args:
        adapters: The inputs.
        base: The model that they were trained on, or None.

    Returns:
        Parts as rows of the fused weight; or, where the base keeps them apart, the fused modules in parts.

    Raises:
        LayoutError: Nothing tells which rows are whose.
        ShapeError: The parts' heights do not add up to the fused weight's.
    """
    modules: dict[Path, Module] = {}
    for adapter in adapters:
        for target, module in adapter.modules.items():
            modules.setdefault((target.component, target.path), module)
    mixed = _mixed(modules)
    if not mixed:
        return list(adapters)
    rows = {part: _rows(part, fused, modules, base) for part, fused in mixed.items()}
    unknown = [f"{part[1]} in {mixed[part][1]}" for part, found in rows.items() if found is None]
    if unknown:
        raise LayoutError(
            f"{len(unknown)} parts of weights that another input has fused, and nothing tells which rows are theirs",
            keys=unknown,
            expected="The base model's configuration was expected, of a family whose fused weights are known",
            todo="Give the model's folder with --base, or bake the adapters into it",
        )
    known = {part: found for part, found in rows.items() if found is not None}
    return [_one(adapter, mixed, known, modules, _apart(mixed, base)) for adapter in adapters]


def _apart(mixed: Mapping[Path, Path], base: BaseModel | None) -> dict[Path, list[Part]]:
    """The fused weights whose parts a base keeps apart, with all of them."""
    found: dict[Path, list[Part]] = {}
    for fused in dict.fromkeys(mixed.values()) if base is not None else ():
        parts = _fused_rows.parts_of(fused[1], lambda path: _height_in(base, path))
        if parts is not None and _height_in(base, fused[1]) is None:
            found[fused] = parts
    return found


def _mixed(modules: Mapping[Path, Module]) -> dict[Path, Path]:
    """The parts whose fused weight another module is of."""
    return {
        (component, path): (component, fused)
        for component, path in modules
        for fused in _fused_rows.fused_of(path)
        if (component, fused) in modules
    }


def _rows(part: Path, fused: Path, modules: Mapping[Path, Module], base: BaseModel | None) -> Rows | None:
    """Which rows of a fused weight are a part's."""
    if base is not None:
        known = _fused_rows.part_in(part[1], base.config)
        if known is not None and known.path == fused[1]:
            return known.rows
    order = _fused_rows.order_of(part[1], fused[1])
    if order is None or (base is not None and base.find(f"{fused[1]}.weight") is not None):
        return None
    stem = part[1].rpartition(".")[0]
    heights = [_height((part[0], f"{stem}.{name}" if stem else name), modules, base) for name in order]
    whole = _height(fused, modules, base)
    filled = _filled(heights, whole)
    if filled is None:
        return None
    if whole is not None and sum(filled) != whole:
        raise ShapeError(
            f"{fused[1]} has {whole} rows, its parts {' + '.join(map(str, filled))}",
            keys=[ref.name for each in (part, fused) for _, ref in modules[each].tensors() if ref.name],
            expected="Adapters of one base model were expected",
            todo="Merge adapters that were trained on the same model",
        )
    return _fused_rows.in_turn(*filled)[order.index(part[1].rpartition(".")[2])]


def _height(path: Path, modules: Mapping[Path, Module], base: BaseModel | None) -> int | None:
    """How many rows a weight has, as far as an input or the base tells."""
    module = modules.get(path)
    if module is not None and module.shape:
        return module.shape[0]
    return _height_in(base, path[1])


def _height_in(base: BaseModel | None, path: str) -> int | None:
    weight = base.find(f"{path}.weight") if base is not None else None
    return weight.shape[0] if weight is not None and weight.shape else None


def _filled(heights: Sequence[int | None], whole: int | None) -> list[int] | None:
    """The heights of all parts: k and v have the same, gate and up too, and all make up the whole."""
    found = list(heights)
    twins = found[-2:]
    known = next((each for each in twins if each is not None), None)
    if known is None and whole is not None and len(found) == 3 and found[0] is not None:
        known = (whole - found[0]) // 2
    if known is None:
        return None
    found[-2:] = [known if each is None else each for each in twins]
    if len(found) == 3 and found[0] is None and whole is not None:
        found[0] = whole - 2 * known
    return None if any(each is None or each <= 0 for each in found) else [each or 0 for each in found]


def _one(
    adapter: Adapter,
    mixed: Mapping[Path, Path],
    rows: Mapping[Path, Rows],
    modules: Mapping[Path, Module],
    apart: Mapping[Path, Sequence[Part]],
) -> Adapter:
    """One input under the common names."""
    made: dict[Target, Module] = {}
    for target, module in adapter.modules.items():
        own = (target.component, target.path)
        fused = mixed.get(own)
        if fused is not None and fused not in apart:
            whole = Target(fused[0], fused[1], rows[own])
            made[whole] = module._replace(target=whole, in_first=modules[fused].in_first)
        elif own in apart:
            made.update(_parted(module, apart[own]))
        else:
            made[target] = module
    return replace(adapter, modules=made)


def _parted(module: Module, parts: Sequence[Part]) -> dict[Target, Module]:
    """A module of a fused weight as modules of its parts."""
    found: dict[Target, Module] = {}
    for part in parts:
        piece = module.target._replace(rows=part.rows)
        own = _cut.split(module, piece, [each.rows for each in parts], part.rows.of)
        if own is not None:
            target = Target(module.target.component, part.path)
            found[target] = own._replace(target=target)
    return found
