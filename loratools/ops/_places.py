"""Where each module of an adapter has its place in a base: the stored tensors that hold its rows, and their biases.

Names that the architecture's tables explain are looked up; others (language models, flattened names of anything) are
compared with the base's own, as ``_base_match`` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from loratools import archs
from loratools.io.base import Base, Weight
from loratools.model import EMPTY, Module, Rows, Target
from loratools.ops import _fused_rows, _unet_depth
from loratools.ops._base_match import Paths, bare, match
from loratools.ops._base_parts import fits
from loratools.ops._changes import Piece, Span
from loratools.ops._identify import is_conv1d, is_projection, keeps_inputs_first
from loratools.ops._network import Stored, chosen, networks
from loratools.ops._pieces import Held, dialects, held, meaning, spans
from loratools.tensors import DTYPES

Shape = tuple[int, ...]


class Place(NamedTuple):
    """Where a module's rows lie in a base.

    Attributes:
        part: The subfolder of a diffusers model, or empty.
        pieces: The tensors that hold them.
        biases: The biases beside the pieces, None where there is none; spans are the pieces' own.
    """

    part: str
    pieces: tuple[Piece, ...]
    biases: tuple[Weight | None, ...]


class Found(NamedTuple):
    """What looking up one component's modules came to.

    Attributes:
        places: By the modules' targets.
        missing: Targets that the base has nothing for.
        ambiguous: Targets that may mean several modules of the base, with their paths.
        misfits: Sentences on modules whose shape is not the base's.
    """

    places: dict[Target, Place]
    missing: list[Target]
    ambiguous: dict[Target, tuple[str, ...]]
    misfits: list[str]


class _Wanted(NamedTuple):
    """A module, what it means in the base's architecture, and the shapes that tensors will have, by key."""

    module: Module
    target: Target
    resized: Mapping[str, Shape]


class _Cut(NamedTuple):
    """What a stored tensor has of a module.

    Attributes:
        path: The base's path.
        shape: Of the tensor.
        spans: Which of the module's rows are which of its own; None where shares are no whole rows.
        turned: Whether it is stored as (in, out).
        packed: Whether it holds a quantisation's codes.
    """

    path: str
    shape: Shape
    spans: tuple[Span, ...] | None
    turned: bool = False
    packed: bool = False


class Places:
    """One component of a base, in which modules are looked up.

    Attributes:
        component: Its name.
        network: What the base holds of it; empty where it holds nothing that may be it.
        others: Further networks of the base that the component may be (a second transformer).
    """

    def __init__(self, base: Base, arch: str, component: str, keys: Iterable[str] = ()) -> None:
        """Find the component in a base.

        Args:
            base: From :func:`loratools.io.base.keys_of`.
            arch: The architecture's name.
            component: "denoiser", "text_encoder", …
            keys: The adapter's keys, which may name the one of several networks that is meant.
        """
        self.component = component
        self.network, self.others = chosen(networks(base, arch, component), keys)
        row = archs.component(arch, component)
        self._table = row.table if row is not None else None
        self._modules = self.network.modules
        self._renumbered = None
        if self._table is not None:
            self._renumbered = _unet_depth.renumbered(self._table, self._modules)
        if self._renumbered is not None:
            self._table = self._renumbered.own
        self._order = dialects(self._table, self._modules) if self._table is not None else ()
        self._inputs_first = keeps_inputs_first(self._modules)
        self._config = base.configs.get(self.network.part, {})

    @property
    def paths(self) -> Mapping[str, Stored]:
        """The base's modules by their own paths."""
        return self._modules

    def find(self, modules: Sequence[Module], resized: Mapping[str, Shape] = EMPTY) -> Found:
        """The places of an adapter's modules.

        Args:
            modules: Of this component.
            resized: The shapes of tensors that something else of the adapter gives another vocabulary, by key.
        """
        if self._renumbered is None:
            return self._find(modules, resized)
        numbered = _unet_depth.spelt_by_number([ref.name for each in modules for _, ref in each.tensors()])
        # A file that numbers blocks means this UNet's numbers, where either reading finds as much.
        readings = [self._find(modules, resized, numbered=way) for way in (numbered, not numbered)]
        return max(readings, key=lambda found: len(found.places))

    def has(self, path: str) -> bool:
        """Whether the base has a weight of this path, in whatever pieces."""
        return held(self._table, self._modules, Target(self.component, path), self._order) is not None

    def owner(self, name: str) -> str | None:
        """The whole path of a module whose parameters have names of their own: fused experts, packed weights."""
        parents = {path.rpartition(".")[0] for path, stored in self._modules.items() if stored.bare}
        path = match(
            [name], Paths(parents - {""}, flat="." not in name), lambda _name, _path: True
        ).paths.get(name)
        return None if path is None else self.network.prefix + path

    def stored(self, name: str) -> str | None:
        """The base's path of one module by a name in any dialect, or with other wrappers around it."""
        if name in self._modules:
            return name
        target = self._meant(Target(self.component, name), numbered=False)
        whole = held(self._table, self._modules, target, self._order)
        if whole is not None and len(whole) == 1:
            return whole[0].path
        near = match([name], Paths(self._modules, flat="." not in name), lambda _name, _path: True)
        return near.paths.get(name)

    def _find(
        self, modules: Sequence[Module], resized: Mapping[str, Shape], *, numbered: bool = False
    ) -> Found:
        found = Found({}, [], {}, [])
        strangers: list[Module] = []
        for module in modules:
            target = self._meant(module.target, numbered=numbered)
            if self._table is None or self._table.native(target.path) is None:
                strangers.append(module)
                continue
            pieces = held(self._table, self._modules, target, self._order)
            if pieces is None:
                found.missing.append(module.target)
            else:
                self._settle(found, _Wanted(module, target, resized), pieces)
        self._compare(found, strangers, resized)
        return found

    def _meant(self, target: Target, *, numbered: bool) -> Target:
        """A target with its path in the table's native names; as it is where no table explains it."""
        if self._table is None:
            return target
        if self._renumbered is not None:
            path = self._renumbered.path(target.path, numbered=numbered)
            return target if path is None else target._replace(path=path)
        meant = meaning(self._table, target.path)
        if meant is None or meant[0] == target.path:
            return target
        return target._replace(path=meant[0], rows=target.rows or meant[1])

    def _compare(self, found: Found, modules: Sequence[Module], resized: Mapping[str, Shape]) -> None:
        """Modules that no table explains take the base's paths by the likeness of names."""
        by_name = {bare(module.target.path): module for module in modules}
        if not by_name:
            return
        paths = Paths(self._modules, flat=all("." not in name for name in by_name))

        def may_be(name: str, path: str) -> bool:
            stored = self._modules[path].weight
            return stored is None or fits(by_name[name], stored.shape)

        result = match(list(by_name), paths, may_be)
        for module in modules:
            name = bare(module.target.path)
            path = result.paths.get(name) or result.misfits.get(name)
            if path is not None:
                held_whole = [Held(path, None)]
                self._settle(found, _Wanted(module, module.target, resized), held_whole)
            elif name in result.ambiguous:
                found.ambiguous[module.target] = result.ambiguous[name]
            elif (regrouped := self._regrouped(name)) is not None:
                target = module.target._replace(rows=module.target.rows or regrouped[0])
                self._settle(found, _Wanted(module, target, resized), regrouped[1])
            else:
                found.missing.append(module.target)

    def _regrouped(self, name: str) -> tuple[Rows | None, list[Held]] | None:
        """Which rows of a fused weight a name means, and what the base has of that; None where it has nothing."""
        fused = _fused_rows.part_in(name, self._config)
        if fused is not None:
            path = self.stored(fused.path)
            return None if path is None else (fused.rows, [Held(path, None)])
        parts = _fused_rows.parts_of(name, self._height)
        if parts is None:
            return None
        return None, [Held(path, part.rows) for part in parts if (path := self.stored(part.path))]

    def _height(self, name: str) -> int | None:
        path = self.stored(name)
        weight = self._modules[path].weight if path is not None else None
        return weight.shape[0] if weight is not None and weight.shape else None

    def _settle(self, found: Found, wanted: _Wanted, pieces: Sequence[Held]) -> None:
        """A module's place, or the sentence that says why it does not fit."""
        cut = [part for each in pieces if (part := self._cut(wanted, each, len(pieces) == 1)) is not None]
        misfit = _misfit(wanted.module, cut)
        if len(cut) < len(pieces):
            # A bias alone, beside a weight that a quantisation keeps under other names.
            found.missing.append(wanted.module.target)
        elif misfit:
            found.misfits.append(misfit)
        else:
            kept = [(self._modules[part.path], part) for part in cut]
            pieces_of = [
                Piece(stored.weight, part.spans, part.turned)
                for stored, part in kept
                if stored.weight is not None and part.spans is not None
            ]
            biases = tuple([stored.bias for stored, _ in kept])
            found.places[wanted.module.target] = Place(self.network.part, tuple(pieces_of), biases)

    def _cut(self, wanted: _Wanted, each: Held, alone: bool) -> _Cut | None:
        """Which rows of a module a stored tensor has, and whether it is stored as (in, out)."""
        weight = self._modules[each.path].weight
        if weight is None:
            return None
        shape = wanted.resized.get(weight.key, weight.shape)
        if not DTYPES[weight.dtype].floating or not shape:
            # A quantisation's codes: they are refused by name, whatever shape they have.
            return _Cut(each.path, shape, ((0, shape[0] if shape else 1, 0),), packed=True)
        turned = self._turned(wanted, each, shape, alone)
        height = shape[1] if turned else shape[0]
        return _Cut(each.path, shape, spans(wanted.target.rows, each.rows, height), turned)

    def _turned(self, wanted: _Wanted, each: Held, shape: Shape, alone: bool) -> bool:
        """Whether a tensor is stored as (in, out): shapes say, or the network's other biases, or the adapter.

        An adapter may say the contrary of what is so: PEFT corrects its flag as it loads, but not in the file.
        """
        if len(shape) != 2 or is_projection(each.path, self._modules[each.path]):
            return len(shape) == 2
        module, said = wanted.module, wanted.module.shape
        gpt2 = self._inputs_first and is_conv1d(each.path, shape)
        if module.op == "embedding" or said is None or len(said) != 2 or not alone:
            return module.in_first or module.op == "embedding" or gpt2
        rows = wanted.target.rows or Rows(((0, 1),), 1)
        whole = (said[0] * rows.of // rows.shares, said[1])
        may_be_turned = self._table is None or module.in_first
        if whole != shape and whole == shape[::-1]:
            return may_be_turned
        return shape[0] == shape[1] and (gpt2 or module.in_first)


def _misfit(module: Module, cut: Sequence[_Cut]) -> str:
    """The sentence on a module that its place does not fit; empty where it does, or does not tell."""
    if any(part.packed for part in cut):
        return ""
    stored = ", ".join(
        [f"{list(part.shape)}" + f" ({part.path})" * (part.path != module.target.path) for part in cut]
    )
    if any(part.spans is None for part in cut):
        return f"{module.target}: its rows are no whole shares of the base's {stored}"
    said = module.shape
    if said is None:
        return ""
    height = sum(stop - start for part in cut for start, stop, _ in part.spans or ())
    widths = {math.prod(part.shape[:1] if part.turned else part.shape[1:]) for part in cut}
    if height == said[0] and widths == {math.prod(said[1:])}:
        return ""
    return f"{module.target}: the adapter's is {list(said)}, the base's {stored}"
