"""Modules of several adapters brought to the same targets, so that they can be combined.

Only here are fused and split weights regrouped. Splitting a fused module is exact and free: the pieces share
``down`` and take their rows of ``up``. Contributing a piece to a fused weight is exact too: its ``up`` gets zero rows
where the other pieces lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm

import torch

from loratools import archs
from loratools.errors import ArchitectureError, NameResolutionError, ShapeError
from loratools.model import Adapter, Module, Rows, Target
from loratools.ops import _row_orders, files

# Architectures without a table, whose paths are their own names.
_IDENTITY = {"llm", "speech", "vision"}


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one input brings to one target.

    Attributes:
        source: Position of the input.
        module: Its module, of the same target or of one that overlaps it.
        target: Where it contributes.
    """

    source: int
    module: Module
    target: Target

    @property
    def whole(self) -> bool:
        """Whether the module is the target's own, so that no rows have to be taken or padded."""
        return self.module.target == self.target

    def place(self, up: torch.Tensor) -> torch.Tensor:
        """The module's ``up`` (out, …) with its rows where the target has them, zeros elsewhere."""
        if self.whole:
            return up
        return take_rows(up, self.module.target.rows, self.target.rows, str(self.target))


def take_rows(up: torch.Tensor, have: Rows | None, want: Rows | None, name: str) -> torch.Tensor:
    """Rows of a weight in another order or selection.

    Args:
        up: (rows of ``have``, …).
        have: Which rows of the whole weight ``up`` has; None for all.
        want: Which rows the result has; None for all. Those that ``have`` lacks become zero.
        name: For the message.

    Raises:
        ShapeError: The height of ``up`` is not a whole number of shares.
    """
    whole = Rows(((0, 1),), 1)
    have, want = have or whole, want or whole
    of = lcm(have.of, want.of)
    held, asked = _units(have, of), _units(want, of)
    unit, rest = divmod(up.shape[0], len(held))
    if rest:
        raise ShapeError(
            f"{name}: {up.shape[0]} rows cannot be parted into {len(held)} equal shares",
            expected=f"A multiple of {len(held)} rows was expected",
        )
    position = {share: index for index, share in enumerate(held)}
    parts = up.reshape(len(held), unit, *up.shape[1:])
    blank = torch.zeros_like(parts[0])
    return torch.cat([parts[position[share]] if share in position else blank for share in asked])


def _units(rows: Rows, of: int) -> list[int]:
    factor = of // rows.of
    return [unit for start, stop in rows.spans for unit in range(start * factor, stop * factor)]


def align(
    adapters: Sequence[Adapter], arch: str, dialect: str, layout: str = ""
) -> dict[Target, list[Contribution]]:
    """Every target of the result, with what each input brings to it, in order of first appearance.

    Args:
        adapters: The inputs.
        arch: Their common architecture, or "unknown".
        dialect: Whose grain the result has: "native" or "diffusers" names of the architecture, or "kohya".
        layout: The result's, for components that it spells in another dialect than its usual one.

    Raises:
        ShapeError: Two inputs disagree on a weight's shape.
        LayoutError: Their rows are in different orders, or in another than the result's.
    """
    _row_orders.refuse_mixture(adapters, layout)
    by_path: dict[tuple[str, str], list[tuple[int, Module]]] = {}
    for source, adapter in enumerate(adapters):
        for module in adapter.modules.values():
            key = (module.target.component, module.target.path)
            by_path.setdefault(key, []).append((source, module))
    _refuse_two_spellings(by_path)
    found: dict[Target, list[Contribution]] = {}
    for (component, path), members in by_path.items():
        pieces = _pieces(members, component, path, arch, dialect=dialect, layout=layout)
        for rows in pieces:
            target = Target(component, path, rows)
            touching = [(source, module) for source, module in members if _overlap(module.target.rows, rows)]
            if touching:
                found[target] = [Contribution(source, module, target) for source, module in touching]
    _check_shapes(found, adapters)
    return found


def _refuse_two_spellings(by_path: Mapping[tuple[str, str], object]) -> None:
    """Refuse weights of an unknown architecture that inputs name with dots and with underscores.

    Raises:
        NameResolutionError: They may be one weight, which would not be summed.
    """
    flattened: dict[str, str] = {}
    twins: list[str] = []
    for _, path in by_path:
        other = flattened.setdefault(path.replace(".", "_"), path)
        if other != path:
            twins.append(f"{other} and {path}")
    if twins:
        raise NameResolutionError(
            f"{len(twins)} weights are named with dots in one input and with underscores in another",
            keys=twins,
            expected="Inputs of an architecture that is not known must spell their names alike",
            todo="Say which architecture it is with --arch",
        )


def _pieces(
    members: Sequence[tuple[int, Module]], component: str, path: str, arch: str, *, dialect: str, layout: str
) -> list[Rows | None]:
    present = list(dict.fromkeys(module.target.rows for _, module in members))
    if None in present:
        # Where one input changes the whole weight, parts of it are rows of that.
        present = [None]
    owner = archs.component(arch, component)
    if owner is None or owner.table is None:
        return present
    return list(owner.table.pieces(path, owner.dialect(layout, dialect))) or present


def _overlap(have: Rows | None, want: Rows | None) -> bool:
    if have is None or want is None:
        return True
    of = lcm(have.of, want.of)
    return not set(_units(have, of)).isdisjoint(_units(want, of))


def _check_shapes(found: Mapping[Target, Sequence[Contribution]], adapters: Sequence[Adapter]) -> None:
    wrong: list[str] = []
    for target, contributions in found.items():
        shapes = {_whole_shape(each.module): adapters[each.source].path for each in contributions}
        if len(shapes) > 1:
            said = " against ".join(f"{list(shape)}" for shape in shapes)
            wrong.append(f"{target}: {said}")
    if wrong:
        raise ShapeError(
            f"the inputs disagree on the shape of {len(wrong)} weights",
            keys=wrong,
            expected="All inputs must be made for base models of the same widths",
            todo="Leave out those that were made for another base model",
        )


def _whole_shape(module: Module) -> tuple[int, ...]:
    """The base weight's shape with all its rows, a 1x1 kernel left out."""
    shape = module.shape or ()
    rows = module.target.rows
    height = shape[0] if shape else 0
    if rows is not None:
        height = height * rows.of // rows.shares
    kernel = shape[2:] if any(size > 1 for size in shape[2:]) else ()
    return (height, *shape[1:2], *kernel)


def common_arch(adapters: Sequence[Adapter]) -> str:
    """The architecture that all inputs share; one that could not be told follows the others.

    Raises:
        ArchitectureError: Two inputs are of different architectures; the message names them.
    """
    known = [adapter for adapter in adapters if adapter.arch != "unknown"]
    names = list(dict.fromkeys(adapter.arch for adapter in known))
    if len(names) > 1:
        table = archs.all_archs()
        said = [f"{adapter.path or 'an input'}: {table[adapter.arch].title}" for adapter in known]
        raise ArchitectureError(
            "adapters of different architectures cannot be merged",
            keys=said,
            todo="Merge adapters of one base model; --arch NAME overrides what was detected",
        )
    if len(known) < len(adapters) and names:
        return names[0] if _same_names(adapters) else "unknown"
    return names[0] if names else "unknown"


def clarified(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The inputs, those whose architecture could not be told read again as the others'.

    A file that adapts only what several architectures spell alike is of the one it is merged with, if that explains
    most of its names.
    """
    known = {adapter.arch for adapter in adapters} - {"unknown"}
    if known > {"llm"} and known <= _IDENTITY and _share_a_branch(adapters):
        # Some parts of a speech or vision model look like a language model's; all inputs are of the one model.
        name = sorted(known - {"llm"})[0]
        return [
            files.load(each.path, arch=name) if each.arch == "llm" and each.path else each
            for each in adapters
        ]
    if len(known) != 1:
        return list(adapters)
    name = known.pop()
    return [_as(adapter, name) if adapter.arch == "unknown" else adapter for adapter in adapters]


def _share_a_branch(adapters: Sequence[Adapter]) -> bool:
    """Whether all inputs have modules under the same first two names, such as model.decoder."""
    branches = [{".".join(target.path.split(".")[:2]) for target in adapter.modules} for adapter in adapters]
    return bool(set.intersection(*branches))


def _as(adapter: Adapter, arch: str) -> Adapter:
    if not adapter.path or not adapter.order:
        return adapter
    try:
        again = files.load(adapter.path, arch=arch)
    except ArchitectureError:
        return adapter
    table = archs.get(arch)
    components = {component.name for component in table.components}
    named = [
        target
        for target in again.modules
        if target.component in components and table.pieces(target.component, target.path, "native")
    ]
    return again if 4 * len(named) >= 3 * len(again.modules) else adapter


def _same_names(adapters: Sequence[Adapter]) -> bool:
    first = {(target.component, target.path) for target in adapters[0].modules}
    return all(
        first & {(target.component, target.path) for target in adapter.modules} for adapter in adapters[1:]
    )
