"""Normal forms: what a program cannot hold of an adapter becomes what it can, with the same ΔW where that is possible.

Kinds that it does not apply, DoRA among them, become LoRA; ranks are padded with zeros to one; the scales of all
modules become one. What cannot be turned into anything that it holds stays a misfit: refused by name, unless it is
dropped or written apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from loratools import formats, runtimes
from loratools.errors import ArchitectureError, OptionError, UnsupportedKindError
from loratools.formats import Format
from loratools.io.base import Base
from loratools.model import Adapter, Module, Target
from loratools.ops import _doctor_features, _doctor_mend, _doctor_runtime
from loratools.ops._doctor_case import Case
from loratools.ops._fit import Fitted
from loratools.ops.results import Conversion, Normalised
from loratools.runtimes import FEATURES, Runtime

# What only a configuration says, and no tensor could make up for.
_STATED = ("mutated_base", "layer_replication", "alora", "variant")
# The roles of a module that a feature stands for.
_ROLES: Mapping[str, frozenset[str]] = {
    "dora": frozenset({"magnitude", "magnitude_in"}),
    "lora_bias": frozenset({"up_bias", "diff_b"}),
}


class Demand(NamedTuple):
    """What an adapter is to be brought into.

    Attributes:
        runtime: The program.
        rank: The rank of every module, a count, to which higher ones are cut; None: the highest that there is.
        bucket: Whether to pad to the next rank that the program provides for.
        apart: Whether whole tensors that it cannot hold are written apart.
    """

    runtime: Runtime
    rank: int | None = None
    bucket: bool = False
    apart: bool = False


def names() -> list[str]:
    """The programs with a normal form."""
    return [name for name, found in runtimes.runtimes().items() if found.normal]


def runtime_of(name: str) -> Runtime | None:
    """The program with a normal form that ``--to`` names, or None where the name is a layout's alone."""
    found = runtimes.runtimes().get(name)
    return found if found is not None and found.normal else None


def restricted(form: Format, runtime: Runtime) -> Format:
    """A layout with a place only for what a program applies."""
    gone = {role for feature, roles in _ROLES.items() if not runtime.holds(feature) for role in roles}
    return form._replace(roles=form.roles - gone)


def refuse_others(adapter: Adapter, runtime: Runtime) -> None:
    """Refuse an adapter of a kind of model that a program does not run, or with fields that it does not know.

    Raises:
        ArchitectureError: It is for an image model, say.
        UnsupportedKindError: Its configuration changes what it does; the fields are named.
    """
    case = Case(adapter.path, config=adapter.config, adapter=adapter)
    for finding in _doctor_runtime.family(case, runtime):
        raise ArchitectureError(
            finding.what,
            path=adapter.path or None,
            expected=f"An adapter of a {' or '.join(sorted(runtime.families))} model was expected",
            todo=f"Choose a layout of programs that run such models with --to: {', '.join(_elsewhere(adapter))}",
        )
    used = _doctor_features.used(case)
    for feature in _STATED:
        if feature in used and not runtime.holds(feature):
            said = runtime.refuses.get(feature) or runtime.ignores[feature]
            raise UnsupportedKindError(
                f"{runtime.title} does not hold {FEATURES[feature]}: {said}",
                path=adapter.path or None,
                keys=used[feature].keys,
                expected="An adapter of the base as it was published, and of plain factors, was expected",
                todo=_doctor_mend.words(feature),
            )


def _elsewhere(adapter: Adapter) -> list[str]:
    """The layouts of the programs that run models of an adapter's kind."""
    case = Case(adapter.path, adapter=adapter)
    run = [found for found in runtimes.runtimes().values() if not list(_doctor_runtime.family(case, found))]
    return sorted({layout for found in run for layout in found.layouts} & set(formats.writable()))


def held(
    adapter: Adapter, demand: Demand, base: Base | None, drop: Iterable[str], dtype: str, device: str
) -> tuple[Adapter, dict[Target, Module], list[Conversion]]:
    """The adapter with modules turned into LoRA that the program applies only as that, or whose rank is too high.

    Args:
        adapter: Any.
        demand: What it is brought into.
        base: The base model, for kinds that need it.
        drop: What will be left out, and is not turned into anything.
        dtype: The store dtype ("F16", …), or empty for each module's own.
        device: Where to compute.

    Returns:
        The adapter, the former modules by target, and what was done to each, in the same order.

    Raises:
        UnsupportedKindError: A module has no ΔW that could be computed, or needs the base; all are named.
        OptionError: A module is to be cut, and to lose its magnitude.
    """
    # Cutting the factors of a DoRA would not cut its ΔW; and a model is DoRA as a whole, or not at all.
    with_dora = demand.runtime.holds("dora") and not any(
        module.magnitude is not None and _is_high(module, demand) for module in adapter.modules.values()
    )
    chosen = {
        target: module
        for target, module in adapter.modules.items()
        if _must_become_lora(module, demand, frozenset(drop), with_dora=with_dora)
    }
    if not chosen:
        return adapter, {}, []
    left = [str(target) for target, module in chosen.items() if module.magnitude is not None]
    if left and "magnitude" in drop:
        raise OptionError(
            f"{len(left)} modules would lose their magnitude and be cut to rank {demand.rank}",
            path=adapter.path or None,
            keys=left,
            expected="What is cut is ΔW, which the magnitude is part of",
            todo="Convert without --rank first, and `loratools resize` the result; or give --base instead of --drop",
        )
    from loratools.ops import _normal_dense

    found, before, done = _normal_dense.as_lora(
        replace(adapter, modules=chosen), rank=demand.rank, base=base, dtype=dtype, device=device
    )
    return replace(adapter, modules={**adapter.modules, **found.modules}), before, done


def _is_high(module: Module, demand: Demand) -> bool:
    return demand.rank is not None and (module.rank or 0) > demand.rank


def _must_become_lora(module: Module, demand: Demand, drop: frozenset[str], *, with_dora: bool) -> bool:
    if module.kind in drop or module.target.component in drop or module.op == "conv":
        return False
    if module.kind not in ("lora", "experts"):
        return module.kind not in demand.runtime.kinds
    if module.magnitude is not None and "magnitude" not in drop:
        return not with_dora
    return _is_high(module, demand)


def unheld(adapter: Adapter, modules: Iterable[Module], runtime: Runtime) -> dict[str, str]:
    """Why the program does not apply some modules, by their targets as text.

    Args:
        adapter: That they are of.
        modules: As they would be written.
        runtime: The program.
    """
    adapter = replace(adapter, modules={module.target: module for module in modules})
    used = _doctor_features.used(Case(adapter.path, config=adapter.config, adapter=adapter))
    why: dict[str, str] = {}
    for feature in ("conv", "mid", "embedding", "fused_experts", "split_experts"):
        if feature in used and not runtime.holds(feature):
            said = runtime.refuses.get(feature) or runtime.ignores[feature]
            why.update(dict.fromkeys(used[feature].keys, f"{FEATURES[feature]} ({runtime.title}: {said})"))
    for target, module in adapter.modules.items():
        if module.kind != "experts" and module.kind not in runtime.kinds:
            why[str(target)] = f"modules of kind {module.kind} ({runtime.title} does not apply them)"
    return why


def account(
    fitted: Sequence[Fitted], origins: Mapping[Target, Module], conversions: Sequence[Conversion]
) -> tuple[Normalised, ...]:
    """What became of each module that is not as it was.

    Args:
        fitted: What is written.
        origins: The modules as they were read, by target, where they were turned into another kind first.
        conversions: What was done to those.
    """
    errors = {each.target: each for each in conversions}
    found = []
    for each in fitted:
        module = each.module
        if module is None:
            continue
        source = each.step.sources[0]
        before = origins.get(source.target, source)
        changed = _changed(each, before)
        if changed:
            conversion = errors.get(str(source.target))
            found.append(
                Normalised(
                    str(module.target),
                    changed,
                    (before.rank or 0, module.rank or 0),
                    (before.scale, module.scale),
                    conversion.error if conversion is not None else 0.0,
                    (conversion is None or conversion.exact) and not each.rounded,
                )
            )
    return tuple(found)


def _changed(fitted: Fitted, before: Module) -> tuple[str, ...]:
    """What was done to a module, in words."""
    after = fitted.module
    assert after is not None
    if fitted.step.fate == "added":
        return ("added",)
    ranks = (before.rank or 0, after.rank or 0)
    done = {
        "to lora": before.kind != after.kind or (before.magnitude is not None and after.magnitude is None),
        "padded": before.kind == after.kind and ranks[0] < ranks[1],
        "cut": before.kind == after.kind and ranks[0] > ranks[1],
        "folded": before.kind == after.kind and before.scale != after.scale,
    }
    return tuple(word for word, is_so in done.items() if is_so)
