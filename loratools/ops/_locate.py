"""Which tensors of a base its adapters change: the plan of a bake, by names and shapes alone.

Every module gets the stored tensors that hold its rows, however the base spells, splits or turns them. What has no
place is never passed over: it is an error that names it, or listed where the caller asked for that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from loratools import archs
from loratools.formats import _peft_shared, _peft_special
from loratools.io.base import Base, Weight
from loratools.model import Adapter, Module
from loratools.ops import _experts, _moe_base, _quantised, _replaced, _row_orders, _tied, _unplaced
from loratools.ops._arch_of import settle
from loratools.ops._base_match import bare
from loratools.ops._changes import Change, Plan, Term
from loratools.ops._network import split_key
from loratools.ops._places import Place, Places, Shape
from loratools.ops._projections import completed
from loratools.ops._terms import Spot, Step, scale_of, spots


def plan(
    base: Base,
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    *,
    arch: str | None,
    components: Collection[str] | None,
    skip_missing: bool,
) -> Plan:
    """What adapters do to a base.

    Args:
        base: From :func:`loratools.io.base.keys_of`.
        adapters: In the order in which they are applied.
        strengths: What each one's ΔW is multiplied by.
        arch: The architecture, overriding detection.
        components: Those that may change; None for all.
        skip_missing: Whether what the base has no place for is left out instead of refused.

    Raises:
        ArchitectureError: The adapters are of different architectures.
        OptionError: A component that neither the adapters nor the architecture have.
        NameResolutionError: The base lacks modules, or all of an adapter's, or a name may mean several.
        ShapeError: A module's weight has another shape in the base.
        UnsupportedKindError: The base keeps a weight quantised in a way that nothing can be added to, or an adapter is
            for a base that its training has changed.
    """
    for adapter in adapters:
        _peft_special.refuse_unmergeable(adapter)
        _peft_shared.refuse_bare(adapter)
    name, adapters = settle(base, _row_orders.for_base(adapters, base), arch)
    adapters = [_moe_base.for_base(adapter, base) for adapter in adapters]
    _unplaced.refuse_components(components, adapters, name)
    atlas = Atlas(base, name, dict.fromkeys(target.component for each in adapters for target in each.modules))
    found: list[_Found] = []
    for number, (adapter, strength) in enumerate(zip(adapters, strengths, strict=True)):
        found.append(_Found(atlas, Step(adapter, number, strength), components))
    made = Plan(
        name,
        _changes(base, [spot for each in found for spot in each.spots]),
        missing=tuple([tuple(each.missing) for each in found]),
        matched=tuple([each.matched for each in found]),
        left_out=tuple([each.left_out for each in found]),
        notes=tuple(dict.fromkeys(note for each in found for note in each.notes)),
    )
    _quantised.refuse(base, made.changes)
    made = _tied.resolve(base, made, adapters, strengths)
    for number, each in enumerate(found):
        placed = made.matched[number] or len(each.spots)
        lost = _unplaced.Lost(name, made.missing[number], each.misfits, placed, each.left_out)
        _unplaced.refuse(each.step.adapter, base, lost, atlas.of, skip_missing=skip_missing)
    return made


class Atlas:
    """The components of a base, each looked at once.

    Attributes:
        base: From :func:`loratools.io.base.keys_of`.
        arch: The architecture's name.
        components: Those that adapters change.
    """

    def __init__(self, base: Base, arch: str, components: Iterable[str]) -> None:
        self.base = base
        self.arch = arch
        self.components = tuple(components)
        self._known: dict[tuple[str, frozenset[str]], Places] = {}

    def of(self, component: str, keys: Iterable[str] = ()) -> Places:
        """A component; the first words of an adapter's keys tell which of several networks is meant."""
        heads = frozenset([key.partition(".")[0] for key in keys])
        if (component, heads) not in self._known:
            self._known[component, heads] = Places(self.base, self.arch, component, heads)
        return self._known[component, heads]

    def find(self, component: str, name: str) -> tuple[str, Weight] | None:
        """The stored tensor of a name, ".weight" or ".bias" included: (part, tensor), or None.

        Args:
            component: Whose name it is; empty for any that adapters change.
            name: The base's own, or one of any dialect, without the component's prefix.
        """
        for each in [component] if component else self.components:
            places = self.of(each)
            part = places.network.part
            whole = self.base.parts.get(part, {}).get(places.network.prefix + name)
            if whole is not None:
                return part, whole
            path, leaf = split_key(name)
            known = places.stored(path)
            if known is None:
                continue
            weight, bias, _ = places.paths[known]
            chosen = bias if leaf == "bias" else weight
            if chosen is not None:
                return part, chosen
        return None


class _Found:
    """What one adapter does.

    Attributes:
        step: The adapter.
        spots: Its terms.
        missing: What the base has no place for.
        misfits: Sentences on what does not fit.
        matched: How many modules have their place.
        left_out: How many modules are of components that were not asked for.
        notes: What the caller should know.
    """

    def __init__(self, atlas: Atlas, step: Step, components: Collection[str] | None) -> None:
        self.step = step
        self.spots: list[Spot] = []
        self.missing: list[str] = []
        self.misfits: list[str] = []
        self.matched = 0
        self.left_out = 0
        self.notes: list[str] = []
        saved = self._extras(atlas, components) if step.adapter.extras else []
        # The base's own values in a resized vocabulary come before what is added to them.
        before = [spot for spot in saved if _replaced.is_base_copy(spot.term)]
        resized = {spot.weight.key: spot.term.tensor.shape for spot in before if spot.term.tensor is not None}
        self.spots += before
        for component, modules in step.adapter.components().items():
            if components is None or component in components:
                self._component(atlas, component, modules, resized)
            else:
                self.left_out += len(modules)
        self.spots += [spot for spot in saved if not _replaced.is_base_copy(spot.term)]

    def _component(
        self, atlas: Atlas, component: str, modules: Sequence[Module], resized: Mapping[str, Shape]
    ) -> None:
        """The modules of one component."""
        places = atlas.of(component, [ref.name for each in modules for _, ref in each.tensors()])
        part = places.network.part
        weights = atlas.base.parts.get(part, {})
        found = places.find([each for each in modules if each.kind != "experts"], resized)
        _unplaced.refuse_ambiguous(found.ambiguous, self.step.adapter, atlas.base)
        self.misfits += found.misfits
        self.missing += [str(target) for target in found.missing]
        self.matched += len(found.places)
        for module in completed(modules, lambda module: _inputs(found.places.get(module.target))):
            if module.kind == "experts":
                self._experts(module, places, atlas.base)
            elif module.target in found.places:
                changed, lacking = spots(module, found.places[module.target], self.step, weights)
                self.spots += changed
                self.missing += lacking
        if places.others:
            self.notes.append(
                f"the base has {' and '.join((part, *places.others))}: only {part} changes; give the other folder "
                "itself to change that one"
            )

    def _experts(self, module: Module, places: Places, base: Base) -> None:
        """A module on the experts of a layer, whose weights are one parameter."""
        adapter, number, strength = self.step
        part = places.network.part
        weights = base.parts.get(part, {})
        above, _, leaf = module.target.path.rpartition(".")
        # A path may be the parameter's own; PEFT's are those of its owner.
        key: str | None = f"{places.owner(above)}.{leaf}"
        if key not in weights:
            owner = places.owner(bare(module.target.path))
            key = _experts.parameter_of(adapter, module, weights, owner)
        if key is None:
            self.missing.append(str(module.target))
            return
        config = base.configs.get(part)
        whole = _experts.fitted(adapter, module, weights[key], weights, config)
        term = Term(number, strength, "weight", whole)
        self.spots.append(Spot(part, weights[key], term, module.target.component, split_key(key)[0]))
        self.matched += 1

    def _extras(self, atlas: Atlas, components: Collection[str] | None) -> list[Spot]:
        """Tensors that belong to no module: whole modules, biases, added tokens."""
        adapter, number, strength = self.step
        owners = list(adapter.components())
        if components is not None and owners and not {*owners} & {*components}:
            return []
        terms, missing = _replaced.terms(adapter, number, strength, atlas.base, atlas.find)
        self.missing += missing
        component = owners[0] if owners else archs.get(atlas.arch).components[0].name
        return [Spot(part, weight, term, component, split_key(weight.key)[0]) for part, weight, term in terms]


def _inputs(place: Place | None) -> int | None:
    """How many inputs the weight at a place has."""
    if place is None:
        return None
    piece = place.pieces[0]
    return piece.weight.shape[0 if piece.turned else 1]


def _changes(base: Base, found: Sequence[Spot]) -> tuple[Change, ...]:
    """The tensors that change, in the base's order, each with its terms in the order of the adapters."""
    by_key: dict[tuple[str, str], list[Spot]] = {}
    for spot in found:
        by_key.setdefault((spot.part, spot.weight.key), []).append(spot)
    changes: list[Change] = []
    for part, weights in base.parts.items():
        for key, weight in weights.items():
            here = by_key.get((part, key))
            if here is None:
                continue
            terms = tuple([spot.term for spot in here])
            first = here[0]
            scale = scale_of(weights, weight)
            changes.append(Change(part, weight, terms, first.path, first.component, scale))
    return tuple(changes)
