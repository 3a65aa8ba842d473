"""An adapter's names against those of its base model: which module of the base each one means, and whether it fits.

Names that the architecture's table explains are only looked up, in the checkpoint's own spelling or in another of
the table's, diffusers' first. Others (language models, flattened names of anything) take the base's own module paths,
as ``_base_match`` finds them.
Names change here and nothing else: a fused weight is never taken for its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from loratools import archs
from loratools.errors import NameResolutionError, ShapeError, shown
from loratools.io.base import Base
from loratools.model import Adapter, Module, Target
from loratools.ops._base_match import Matched, Paths, bare, match, near_paths, regrouped
from loratools.ops._base_parts import Modules, Shape, dialects, fits, part_of

# Modules of kinds that share tensors between all weights: they name the model, not a weight in it.
_WHOLE_MODEL = ("base_model", "(whole model)")


class _Found(NamedTuple):
    """What looking one component's modules up came to.

    Attributes:
        paths: The base's path of each module that it has, by the module's own.
        missing: Paths that it does not have.
        misfits: Sentences on modules whose shape is not the base's.
    """

    paths: dict[str, str]
    missing: list[str]
    misfits: list[str]


def against(adapter: Adapter, base: Base) -> Adapter:
    """The adapter with the base's own module paths.

    Args:
        adapter: Of any architecture.
        base: From :func:`loratools.io.base.keys_of`.

    Returns:
        The same adapter where all names are the base's already; components of which the base has nothing (a file of
        the denoiser alone) keep their names, and a note says so.

    Raises:
        NameResolutionError: The base lacks a module, or a name may mean several of its modules.
        ShapeError: A module's weight has another shape in the base.
    """
    found: dict[str, _Found] = {}
    parts = {name: part_of(adapter.arch, name, base) for name in adapter.components()}
    for name, modules in adapter.components().items():
        found[name] = _component(adapter, name, modules, parts[name], base)
    present = {name: each for name, each in found.items() if each.paths or each.misfits}
    if adapter.modules and not present:
        raise _nothing(adapter, base, parts)
    _refuse(adapter, base, present, parts)
    notes = [
        f"{base.path} has no {name}: the names of its {len(each.missing)} modules were not compared"
        for name, each in found.items()
        if name not in present and each.missing
    ]
    return _renamed(adapter, {name: each.paths for name, each in present.items()}, tuple(notes))


def refuse_foreign(adapter: Adapter, base: Base) -> None:
    """Refuse an adapter of which the base has no module at all, or none of its shape.

    Weights that one of them has fused and the other split are no reason, nor are experts, which are packed in ways of
    their own.

    Raises:
        NameResolutionError: The base has other names.
        ShapeError: All weights are of other shapes.
    """
    found: list[_Found] = []
    parts = {name: part_of(adapter.arch, name, base) for name in adapter.components()}
    for name, modules in adapter.components().items():
        plain = [each for each in modules if each.kind != "experts" and ".experts." not in each.target.path]
        if not plain or any(_is_packed(each.target.path, parts[name]) for each in plain):
            return
        found.append(_component(adapter, name, plain, parts[name], base))
    if any(each.paths for each in found):
        return
    misfits = [sentence for each in found for sentence in each.misfits]
    if misfits:
        raise _unfitting(misfits, adapter, base)
    if found:
        raise _nothing(adapter, base, parts)


def _is_packed(path: str, part: Modules) -> bool:
    return bool(regrouped(path, Paths(part, flat="." not in path)))


def _renamed(adapter: Adapter, paths: Mapping[str, Mapping[str, str]], notes: tuple[str, ...]) -> Adapter:
    """The adapter under new paths; keys of its file are forgotten where they no longer hold."""
    modules: dict[Target, Module] = {}
    changed: list[str] = []
    for target, module in adapter.modules.items():
        path = paths.get(target.component, {}).get(target.path, target.path)
        if path != target.path:
            changed.append(f"{target.path} is {path}")
            factors = {role: ref.renamed("") for role, ref in module.factors.items()}
            module = module._replace(target=target._replace(path=path), factors=factors)
        if module.target in modules:
            raise NameResolutionError(
                f"two modules would be {module.target}", path=adapter.path or None, todo="Keep one of them"
            )
        modules[module.target] = module
    if not changed:
        return replace(adapter, notes=(*adapter.notes, *notes)) if notes else adapter
    notes += (f"{len(changed)} modules took the base's names ({changed[0]})",)
    if adapter.extras:
        notes += (f"{len(adapter.extras)} tensors that belong to no module keep the names they had",)
    return replace(adapter, modules=modules, order=(), notes=(*adapter.notes, *notes))


def _component(adapter: Adapter, name: str, modules: Sequence[Module], part: Modules, base: Base) -> _Found:
    """One component's modules: by the table those that it explains, the others by their names' likeness."""
    arch = archs.all_archs().get(adapter.arch)
    row = archs.component(adapter.arch, name)
    tabled: list[Module] = []
    others: list[Module] = []
    for module in modules:
        known = row is not None and row.table is not None and row.table.native(module.target.path) is not None
        if module.target.path not in _WHOLE_MODEL:
            (tabled if known else others).append(module)
    found = _Found({}, [], [])
    if arch is not None and tabled:
        found = _looked_up(arch, tabled, part)
    if not others:
        return found
    return _joined(found, _matched(others, part, adapter, base))


def _joined(first: _Found, second: _Found) -> _Found:
    return _Found(
        {**first.paths, **second.paths},
        first.missing + second.missing,
        first.misfits + second.misfits,
    )


def _looked_up(arch: archs.Arch, modules: Sequence[Module], part: Modules) -> _Found:
    """Modules that keep their names, found in the base under the checkpoint's or diffusers' spelling."""
    found = _Found({}, [], [])
    for module in modules:
        target = module.target
        stored = _stored(arch, target, part)
        if stored is None:
            found.missing.append(target.path)
            continue
        found.paths[target.path] = target.path
        if not fits(module, stored):
            found.misfits.append(_misfit(module, str(target), stored))
    return found


def _stored(arch: archs.Arch, target: Target, part: Modules) -> Shape | None:
    """The shape of what a target means in the base: () where the base does not tell, None where it lacks it."""
    if target.path in part:
        whole = part[target.path] or ()
        if not whole or target.rows is None:
            return whole
        return (whole[0] * target.rows.shares // target.rows.of, *whole[1:])
    spelt = (_spelt(arch, target, part, dialect) for dialect in dialects(arch, target.component))
    return next((shape for shape in spelt if shape is not None), None)


def _spelt(arch: archs.Arch, target: Target, part: Modules, dialect: str) -> Shape | None:
    """As ``_stored``, in one dialect, which may have the weight in pieces."""
    own = arch.spell(target.component, target.path, target.rows, dialect)
    names = [own]
    if own is None:
        pieces = arch.pieces(target.component, target.path, dialect)
        names = [arch.spell(target.component, target.path, rows, dialect) for rows in pieces]
    held = [part[name] or () for name in names if name is not None and name in part]
    if not held or len(held) < len(names):
        return None
    if not all(held) or (own is None and target.rows is not None):
        return ()
    return (sum(shape[0] for shape in held), *held[0][1:])


def _matched(modules: Sequence[Module], part: Modules, adapter: Adapter, base: Base) -> _Found:
    """Modules that take the base's paths."""
    by_name = {bare(module.target.path): module for module in modules}
    flat = all("." not in name for name in by_name)
    paths = Paths(part, flat=flat)

    def may_be(name: str, path: str) -> bool:
        return fits(by_name[name], part[path] or ())

    result = match(list(by_name), paths, may_be)
    _refuse_ambiguous(result, adapter, base)
    misfits = [
        _misfit(by_name[name], f"{name} ({path} in the base)" if name != path else name, part[path] or ())
        for name, path in result.misfits.items()
    ]
    new = {
        module.target.path: result.paths[name] + module.target.path[len(name) :]
        for module in modules
        if (name := bare(module.target.path)) in result.paths
    }
    return _Found(new, result.missing, misfits)


def _misfit(module: Module, where: str, has: Shape) -> str:
    return f"{where}: the adapter's is {list(module.shape or ())}, the base's {list(has)}"


def _refuse_ambiguous(result: Matched, adapter: Adapter, base: Base) -> None:
    if not result.ambiguous:
        return
    name, paths = next(iter(result.ambiguous.items()))
    what = f"may each mean several modules of {base.path}: {name} may be {' or '.join(paths)}"
    if len(paths) == 1:
        what = f"are one module of {base.path}: {paths[0]}"
    raise NameResolutionError(
        f"{len(result.ambiguous)} names {what}",
        path=adapter.path or None,
        keys=list(result.ambiguous),
        expected="One module of the base was expected for each name",
        todo="Give as the base only the network that the adapter is for",
    )


def _refuse(adapter: Adapter, base: Base, found: Mapping[str, _Found], parts: Mapping[str, Modules]) -> None:
    """Refuse modules that the base lacks or has in another shape."""
    missing = [(name, path) for name, each in found.items() for path in each.missing]
    if missing:
        component, path = missing[0]
        flat = "." not in path
        other = regrouped(path, Paths(parts[component], flat=flat))
        raise NameResolutionError(
            f"{len(missing)} of {len(adapter.modules)} modules are not in {base.path}",
            path=adapter.path or None,
            keys=[path for _, path in missing],
            candidates=[] if other else near_paths(path, parts[component]),
            expected=f"The base has {other}: one of them is fused, which no change of names mends"
            if other
            else "Every module was expected in it",
            todo="Give the base that the adapter was trained on",
        )
    misfits = [sentence for each in found.values() for sentence in each.misfits]
    if misfits:
        raise _unfitting(misfits, adapter, base)


def _unfitting(misfits: Sequence[str], adapter: Adapter, base: Base) -> ShapeError:
    return ShapeError(
        f"{len(misfits)} of {len(adapter.modules)} modules do not fit {base.path}",
        path=adapter.path or None,
        keys=misfits,
        expected="Weights of one shape in both were expected",
        todo="Give the base that the adapter was trained on",
    )


def _nothing(adapter: Adapter, base: Base, parts: Mapping[str, Modules]) -> NameResolutionError:
    paths = [target.path for target in adapter.modules]
    names = list(parts[next(iter(parts))]) or [key for part in base.parts.values() for key in part]
    component, path = next(iter(adapter.modules)).component, paths[0]
    other = regrouped(path, Paths(parts[component], flat="." not in path))
    hint = f"; the base has {other}, which is fused where the other is not" if other else ""
    return NameResolutionError(
        f"none of the {len(paths)} modules is in {base.path}{hint}",
        path=adapter.path or None,
        candidates=near_paths(path, parts[component]),
        expected=f"The adapter's names are like {shown(paths, 2)}; the base's are like {shown(names, 2)}",
        todo="Give the base that the adapter was trained on",
    )
