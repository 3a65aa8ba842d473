"""What a layout cannot hold: left out where the caller allows it, else refused by name with what may help."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from loratools import archs, formats
from loratools.errors import LayoutError, LoraError, OptionError
from loratools.formats import Format, _names
from loratools.model import Adapter, Layout, Module, Target
from loratools.ops import files
from loratools.ops._fit import PARTS, Fitted, Misfit, fit
from loratools.ops._regroup import regroup
from loratools.registry import scan
from loratools.tensors import TensorRef

# Kinds that --as lora knows; a LoRA among them has more than two factors.
_BECOME_LORA = frozenset(
    (
        *("lora", "adalora", "loha", "lokr", "oft", "glora", "ia3", "full", "magnitude"),
        *("vera", "miss", "vblora", "unilora"),
    )
)
_TODOS_SHOWN = 2
# Modules that other layouts are tried with, for the message.
_SAMPLE = 12
# Layouts that count their modules: a few of them tell nothing.
_COUNTED = ("cloneofsimo", "sam")


def misfits_of(fitted: Sequence[Fitted], origins: Mapping[Target, Module]) -> list[Misfit]:
    """What was left out of all modules, by the keys of the file even where they were turned into another kind.

    A component's name says what to drop only where none of its modules can be written.
    """
    written = {each.module.target.component for each in fitted if each.module is not None}
    found: list[Misfit] = []
    for each in fitted:
        for misfit in _as_read(each, origins):
            found.append(misfit._replace(tag="unnamed") if misfit.tag in written else misfit)
    return found


def _as_read(fitted: Fitted, origins: Mapping[Target, Module]) -> tuple[Misfit, ...]:
    before = [origins[source.target] for source in fitted.step.sources if source.target in origins]
    if not before or not fitted.misfits:
        return fitted.misfits
    keys = tuple(key for module in before for key in _keys(module))
    return tuple(misfit._replace(keys=keys) for misfit in fitted.misfits)


def apart(
    adapter: Adapter, form: Format, layout: Layout, drop: Iterable[str]
) -> tuple[Adapter, tuple[Misfit, ...]]:
    """An adapter without the components that are to be dropped, where a layout holds but one; and what was left out.

    Which component that is depends on what is left, and is not asked of each module.
    """
    chosen = set(drop) & set(adapter.components())
    # A bare list has no names at all.
    single = form.single or layout.container == "pickle"
    if not single or not chosen or len(chosen) == len(adapter.components()):
        return adapter, ()
    kept = {target: module for target, module in adapter.modules.items() if target.component not in chosen}
    misfits = [
        Misfit(module.target.component, _keys(module), "it holds one component")
        for module in adapter.modules.values()
        if module.target.component in chosen
    ]
    return replace(adapter, modules=kept), tuple(misfits)


def _keys(module: Module) -> tuple[str, ...]:
    return tuple(ref.name for _, ref in module.tensors() if ref.name) or (str(module.target),)


def settle(
    misfits: Sequence[Misfit], drop: Iterable[str], adapter: Adapter, layout: Layout, *, nothing: bool
) -> None:
    """Refuse what the caller does not allow to be dropped.

    Args:
        misfits: What the layout has no place for.
        drop: What may be left out.
        adapter: That they are of, for what may help.
        layout: The target.
        nothing: Whether nothing but them is there, so that dropping them does not help.

    Raises:
        LayoutError: Some misfits are not allowed; the message names their keys, and what would help.
        OptionError: Something is to be dropped that never is.
    """
    allowed = set(drop)
    refuse_unknown(allowed)
    refused = [misfit for misfit in misfits if misfit.tag not in allowed]
    if not refused:
        return
    reasons = list(dict.fromkeys(misfit.reason for misfit in refused))
    # Parts of one fused weight lack the same tensors.
    keys = list(dict.fromkeys(key for misfit in refused for key in misfit.keys))
    shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} other reasons" if len(reasons) > 3 else "")
    raise LayoutError(
        f"the {layout.name} layout cannot hold {len(keys)} of the input's tensors: {shown}",
        path=adapter.path or None,
        keys=keys,
        expected="A place in it was expected for every tensor",
        todo=". ".join(_ways_out(refused, keys, adapter, layout, nothing=nothing)),
    )


def _ways_out(
    refused: Sequence[Misfit], keys: Sequence[str], adapter: Adapter, layout: Layout, *, nothing: bool
) -> list[str]:
    """What may help, a sentence each."""
    tags = list(dict.fromkeys(misfit.tag for misfit in refused))
    ways = list(dict.fromkeys(misfit.todo for misfit in refused if misfit.todo))[:_TODOS_SHOWN]
    others = _that_hold(adapter, keys, layout)
    if others:
        ways.append(
            f"{' and '.join([', '.join(others[:-1])] * bool(others[:-1]) + others[-1:])} can hold them (--to)"
        )
    if _BECOME_LORA & set(tags):
        ways.append("Turn them into LoRA with --as lora")
    if not nothing:
        ways.append(f"Leave them out with {' '.join(f'--drop {tag}' for tag in tags)}")
    return ways or ["Choose another layout"]


def _that_hold(adapter: Adapter, keys: Sequence[str], layout: Layout) -> list[str]:
    """The layouts that have a place for some of the modules that this one has none for."""
    wanted = set(keys)
    members = [
        module
        for module in adapter.modules.values()
        if any(ref.name in wanted for _, ref in module.tensors()) or str(module.target) in wanted
    ][:_SAMPLE]
    sample = replace(adapter, modules={module.target: module for module in members}, order=())
    several = len(adapter.components()) > 1
    forms = [formats.get(name) for name in formats.writable() if name not in (layout.name, *_COUNTED)]
    return [form.name for form in forms if members and not (several and form.single) and _holds(sample, form)]


def _holds(sample: Adapter, form: Format) -> bool:
    goal = files.layout_of(form, "safetensors")
    mixed = _names.mixed(sample.modules.values()) if form.uniform else frozenset()
    try:
        steps = regroup(sample, form).steps
        fitted = [fit(step, sample, goal, form, fold=False, dtype="", mixed=mixed) for step in steps]
    except LoraError:
        return False
    return all(each.module is not None and not each.misfits for each in fitted)


def refuse_unknown(drop: Iterable[str]) -> None:
    """Refuse to drop what has no such name.

    Raises:
        OptionError: Near misses are offered.
    """
    wanted = sorted(set(drop))
    unknown = sorted(set(wanted) - _known_tags()) if wanted else []
    if not unknown:
        return
    import difflib

    known = sorted(_known_tags())
    raise OptionError(
        f"nothing called {unknown[0]!r} can be dropped",
        candidates=difflib.get_close_matches(unknown[0], known),
        expected=f"Known: {', '.join(known)}",
    )


def _known_tags() -> set[str]:
    components = {each.name for arch in archs.all_archs().values() for each in arch.components}
    return {
        "extras",
        "metadata",
        "unnamed",
        "sparse",
        *PARTS.values(),
        *scan("loratools.kinds", "KIND"),
        *components,
    }


def without(adapter: Adapter, extras: Mapping[str, TensorRef]) -> Adapter:
    """The adapter with these tensors of no module alone."""
    config = adapter.config if extras or not adapter.extras else files.without_extras(adapter.config)
    return replace(adapter, extras=extras, config=config)
