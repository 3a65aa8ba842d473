"""The stages of a conversion: what is asked for, modules made ready for a layout, and how they will lie in the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from loratools import formats
from loratools.errors import LayoutError, OptionError
from loratools.formats import Format, _names
from loratools.io.base import Base
from loratools.model import Adapter, Layout, Module, Target
from loratools.ops import (
    _fit,
    _host,
    _moe_convert,
    _moe_told,
    _normal,
    _normal_form,
    _normal_steps,
    _normal_whole,
    _one_alpha,
    _regroup,
    _row_orders,
    _settle,
    files,
)
from loratools.ops.results import Conversion
from loratools.tensors import TensorRef


class Asked(NamedTuple):
    """What a conversion is to make, and with what.

    Attributes:
        form: The layout; of a program's normal form with less than it can hold.
        goal: The same as it will be read.
        demand: What a program demands, or None.
        drop: What may be left out.
        dtype: The store dtype as asked for, or "keep".
        fold: Whether scales go into the factors though the layout has a place for them.
        as_kind: The kind that modules are to be turned into, or None.
        rank: Of those, or None.
        base: The base checkpoint, or None.
        known: Its keys, or None.
        host: What is known of the model.
        device: Where modules are turned into LoRA.
        experts: How modules of experts are written.
        experts_count: How many experts a layer has, where that is given.
    """

    form: Format
    goal: Layout
    demand: _normal.Demand | None
    drop: frozenset[str]
    dtype: str
    fold: bool
    as_kind: str | None
    rank: int | None
    base: files.PathLike | None
    known: Base | None
    host: _host.Host
    device: str
    experts: str
    experts_count: int | None

    @property
    def store(self) -> str:
        """The store dtype by its name in files; empty to keep each module's."""
        return files.STORE_DTYPES.get(self.dtype, "")

    @property
    def named(self) -> Layout:
        """The layout by the name that messages have for it: a program's, where one was asked for."""
        return self.goal if self.demand is None else self.goal._replace(name=self.demand.runtime.title)

    @property
    def changes(self) -> bool:
        """Whether more is asked for than the layout alone."""
        others = self.drop or self.fold or self.store or self.as_kind or self.base or self.demand
        return bool(others) or self.experts != _moe_convert.KEEP


class Ready(NamedTuple):
    """Modules in the order and of the kinds that the layout has, still by their base weights.

    Attributes:
        adapter: With them.
        origins: What modules were before they became another kind.
        conversions: What that cost.
        components: What of other components was left out.
        about: What is known of the model's experts.
        reordered: Whether the layout has their rows in another order.
    """

    adapter: Adapter
    origins: dict[Target, Module]
    conversions: list[Conversion]
    components: Sequence[_fit.Misfit]
    about: _moe_told.About
    reordered: bool


class Fitting(NamedTuple):
    """Modules at the layout's grain.

    Attributes:
        fitted: As they will be written.
        misfits: What the layout has no place for.
        extras: Tensors of no module that it has a place for.
        beside: What goes into a file of its own.
        notes: What the caller should know.
    """

    fitted: Sequence[_fit.Fitted]
    misfits: Sequence[_fit.Misfit]
    extras: Mapping[str, TensorRef]
    beside: _normal_whole.Beside
    notes: Sequence[str]

    def modules(self, store: str) -> dict[Target, Module]:
        """Those that are written, in the store dtype."""
        found = [each.module for each in self.fitted if each.module is not None]
        return {module.target: files.cast_module(module, store) if store else module for module in found}


def writable(layout: str) -> Format:
    """The layout of this name, or that of a program with a normal form.

    Raises:
        LayoutError: There is none, or it is only read.
    """
    runtime = _normal.runtime_of(layout)
    form = formats.get(layout if runtime is None else runtime.layouts[0])
    if form.speller is None or form.finisher is None:
        raise LayoutError(
            f"the {form.title} layout can be read but not written yet",
            expected=f"Written are {', '.join(formats.writable())}",
            todo="Choose another with --to",
        )
    return form


def asked(
    adapter: Adapter,
    layout: str,
    *,
    drop: Iterable[str],
    dtype: str,
    rank: int | None,
    container: str,
    heads: tuple[int | None, int | None],
    base: files.PathLike | None,
    bucket: bool,
    full_weights: bool,
    fold: bool,
    as_kind: str | None,
    device: str,
    experts: str,
    experts_count: int | None,
) -> Asked:
    """What a caller's options mean for an adapter; see ``convert``.

    Raises:
        LoraError: They make no sense together, or the program does not run such a model.
    """
    demand = _normal_form.demanded(layout, rank, bucket=bucket, apart=full_weights)
    form = writable(layout)
    if demand is not None:
        _normal.refuse_others(adapter, demand.runtime)
        form = _normal.restricted(form, demand.runtime)
    if dtype != "keep" and dtype not in files.STORE_DTYPES:
        raise OptionError(f"there is no store dtype {dtype!r}", candidates=[*files.STORE_DTYPES, "keep"])
    host, known = _host.of(base, *heads)
    return Asked(
        form,
        files.layout_of(form, container),
        demand,
        frozenset([drop] if isinstance(drop, str) else drop),
        dtype,
        fold,
        as_kind,
        rank,
        base,
        known,
        host,
        device,
        experts,
        experts_count,
    )


def ready(adapter: Adapter, asked: Asked) -> Ready:
    """Modules under the base's names, their rows in transformers' order, of kinds that the layout has.

    Raises:
        LoraError: A module cannot become what it has to be.
    """
    ordered = _host.settled(adapter, asked.form, asked.host)
    reordered = not _row_orders.alike(ordered, asked.form, asked.host)
    if reordered:
        ordered = _row_orders.as_transformers(ordered, asked.host)
    ordered, about = _moe_convert.told(ordered, asked.base, asked.experts_count)
    named = against(ordered, asked.known)
    if asked.demand is not None and asked.as_kind is None:
        held = _normal.held(named, asked.demand, asked.known, asked.drop, asked.store, asked.device)
        made, origins, conversions = held
    else:
        made, origins, conversions = _as_kind(named, asked)
    made, components = _settle.apart(made, asked.form, asked.goal, asked.drop)
    return Ready(made, origins, conversions, components, about, reordered)


def fitted(ready: Ready, asked: Asked) -> Fitting:
    """Modules split or fused as the layout has them, at the ranks and scales that it can state."""
    form, demand, store = asked.form, asked.demand, asked.store
    regrouped = _regroup.regroup(ready.adapter, form)
    regrouped = _moe_convert.styled(regrouped, form, asked.experts, ready.about, open_up=demand is not None)
    if demand is not None:
        seen = _moe_convert.seen(ready.adapter, regrouped)
        regrouped = _normal_form.steps(regrouped, seen, demand, form, asked.host, asked.known, store)
    elif form.one_rank:
        regrouped = regrouped._replace(steps=_normal_steps.at_one_rank(regrouped.steps))
    mixed = _names.mixed(ready.adapter.modules.values()) if form.uniform else frozenset()
    steps = _one_alpha.steps(regrouped.steps, store) if form.alpha == "file" else regrouped.steps
    steps = _moe_convert.packed(steps, form)
    whole = replace(ready.adapter, modules={step.module.target: step.module for step in steps})
    matched = asked.known is not None
    found = [
        _fit.fit(step, whole, asked.goal, form, fold=asked.fold, dtype=store, mixed=mixed, matched=matched)
        for step in steps
    ]
    found = _host.without_outputs(found, form, asked.host)
    misfits = _settle.misfits_of(found, ready.origins)
    extras, misfits, beside = _normal_form.beside(
        ready.adapter, found, misfits, asked.goal, form, demand, asked.known
    )
    return Fitting(found, misfits, extras, beside, regrouped.notes)


def against(adapter: Adapter, base: Base | None) -> Adapter:
    """The adapter under the base's own names; its tensors keep the keys that they have in the file.

    Raises:
        LoraError: The base is of another sort.
    """
    if base is None:
        return adapter
    from loratools.ops import base_names

    special, others = _moe_convert.apart(adapter)
    _moe_convert.refuse_without(special, base)
    if not others.modules and special.modules:
        return adapter
    found = base_names.against(others, base)
    pairs = zip(found.modules.items(), others.modules.values(), strict=True)
    modules = {target: module._replace(factors=before.factors) for (target, module), before in pairs}
    return replace(found, modules={**modules, **special.modules})


def _as_kind(adapter: Adapter, asked: Asked) -> tuple[Adapter, dict[Target, Module], list[Conversion]]:
    """The adapter with its modules turned into LoRA where that was asked for, and what they were before."""
    if asked.as_kind is None:
        if asked.rank is not None:
            raise OptionError("a rank is given, but no kind to convert to", todo="Add --as lora")
        return adapter, {}, []
    if asked.as_kind != "lora":
        raise OptionError(f"modules cannot be turned into {asked.as_kind!r}", candidates=["lora"])
    from loratools.ops import _as_kind

    return _as_kind.as_lora(
        adapter, rank=asked.rank, base=asked.known, dtype=asked.store or None, device=asked.device
    )
