"""What a layout can hold of a module: roles it has names for, a place for the scale, a name for the weight."""

from __future__ import annotations

from typing import NamedTuple

from loratools import archs, kinds
from loratools.errors import LoraError
from loratools.formats import Format, _names
from loratools.model import Adapter, Layout, Module
from loratools.ops import _scale
from loratools.ops._regroup import Step
from loratools.registry import scan
from loratools.tensors import TensorRef

# What --drop calls the roles that can be left out while the module stays.
PARTS = {
    "magnitude": "magnitude",
    "magnitude_in": "magnitude",
    "up_bias": "bias",
    "diff_b": "bias",
    "b_norm": "norm",
    "w_norm": "norm",
}
_MATCH_BASE = "Give the model that it was made for with --base"
_MATCH = "Give the model that it was made for with --base, or its architecture with --arch"
_SPARSE = ("bias_indices", "bias_values", "bias_size")


class Misfit(NamedTuple):
    """Something that a layout has no place for.

    Attributes:
        tag: What --drop calls it.
        keys: The tensors' keys in the input.
        reason: Why, as a clause.
        todo: What may help, as a sentence, or empty.
    """

    tag: str
    keys: tuple[str, ...]
    reason: str
    todo: str = ""


class Fitted(NamedTuple):
    """A step as the layout will write it.

    Attributes:
        step: As it was planned.
        module: What the layout holds of it; None where nothing of it is left.
        rounded: Whether values may have been rounded.
        spelt: Its tensors under the layout's keys.
        misfits: What was left out of it.
    """

    step: Step
    module: Module | None = None
    rounded: bool = False
    spelt: tuple[TensorRef, ...] = ()
    misfits: tuple[Misfit, ...] = ()


def fit(
    step: Step,
    adapter: Adapter,
    layout: Layout,
    form: Format,
    *,
    fold: bool,
    dtype: str,
    mixed: frozenset[str] = frozenset(),
    matched: bool = False,
) -> Fitted:
    """A step as a layout can hold it, and what it cannot.

    Args:
        step: One module of the result.
        adapter: That it is of.
        layout: The target.
        form: Its description.
        fold: Whether to fold the scale into the factors though the layout has a place for it.
        dtype: The store dtype ("F16", …), or empty for each tensor's own.
        mixed: Components whose magnitudes cannot be held, since not all their modules have one.
        matched: Whether names that no architecture explains are a base model's own.
    """
    if step.problem is not None:
        tag = "unnamed" if step.module.kind == "lora" else step.module.kind
        return _nothing(step, tag, step.problem.problem, step.problem.todo)
    module, misfits = _with_known_roles(step, form, mixed, dtype)
    if module is None:
        return Fitted(step, misfits=misfits)
    if _is_foreign(module, adapter, form):
        reason = f"{module.target.path} is no weight of {archs.get(adapter.arch).title} that it could have a name for"
        return _nothing(step, "unnamed", reason)
    if not matched and _has_lost_dots(module, adapter, form):
        reason = "it has no place for names whose dots a flattened layout has replaced"
        # An architecture that was found or given does not explain the name.
        return _nothing(step, "unnamed", reason, _MATCH if adapter.arch == "unknown" else _MATCH_BASE)
    rounded = step.rounded or _is_rescaled(step.module, module)
    if module.scale != 1.0 and (fold or not form.states_scale(module)):
        try:
            module, changed = _scale.folded(module, dtype)
        except LoraError as error:
            return _nothing(step, module.kind, error.problem)
        rounded = rounded or changed
    try:
        spelt = form.speller(module, adapter, layout) if form.speller is not None else []
    except LoraError as error:
        clause = error.problem.removeprefix(f"the {layout.name} layout cannot hold ")
        reason = f"it has no place for {clause}"
        return _nothing(step, _tag(module, adapter, form), reason, error.todo)
    return Fitted(step, module, rounded, tuple(spelt), misfits)


def _is_foreign(module: Module, adapter: Adapter, form: Format) -> bool:
    """Whether the weight is one that the architecture's table lacks, and the layout would spell it otherwise.

    A name that nobody explains stays as it is where both layouts use the same dialect, and only there: elsewhere it
    would be a name that no reader knows.
    """
    owner = _owner(module, adapter)
    if owner is None or owner.table is None or owner.table.native(module.target.path) is not None:
        return False
    source = scan("loratools.formats", "FORMAT").get(adapter.layout.name)
    return source is None or owner.dialect(source.name, source.dialect) != owner.dialect(
        form.name, form.dialect
    )


def _has_lost_dots(module: Module, adapter: Adapter, form: Format) -> bool:
    """Whether a name that no table explains came flattened, and the layout would have it with its dots."""
    owner = _owner(module, adapter)
    path = module.target.path
    if owner is not None and owner.table is not None and owner.table.native(path) is not None:
        return False
    source = scan("loratools.formats", "FORMAT").get(adapter.layout.name)
    flat = source is not None and (source.separator, form.separator) == ("_", ".")
    return flat and "_" in path and "." not in path


def _owner(module: Module, adapter: Adapter) -> archs.Component | None:
    return archs.component(adapter.arch, module.target.component)


def _nothing(step: Step, tag: str, reason: str, todo: str = "") -> Fitted:
    keys = tuple(ref.name for source in step.sources for _, ref in source.tensors() if ref.name)
    return Fitted(step, misfits=(Misfit(tag, keys or (str(step.module.target),), reason, todo),))


def _with_known_roles(
    step: Step, form: Format, mixed: frozenset[str], dtype: str
) -> tuple[Module | None, tuple[Misfit, ...]]:
    """The module without the roles that the layout has no names for; None where nothing of its kind is left."""
    module = _bias_as_spelt(step.module, form, dtype)
    lacking = form.lacking(module)
    if module.magnitude is not None and not lacking and module.target.component in mixed:
        both = f"both DoRA and plain LoRA in one {module.target.component}, which has one configuration"
        misfit = _part(step, "magnitude")._replace(reason=f"it has no place for {both}")
        return module._replace(magnitude=None, magnitude_axis=None), (misfit,)
    if not lacking:
        return module, ()
    whole = [role for role in lacking if role not in PARTS]
    left = {role: ref for role, ref in module.factors.items() if role not in lacking}
    kind = kinds.get(module.kind)
    if whole or not any(left.keys() >= set(need) for need in kind.needs):
        tag = "sparse" if set(whole) <= set(_SPARSE) and whole else PARTS.get(lacking[0], module.kind)
        tag = module.kind if whole and tag != "sparse" else tag
        return None, _nothing(
            step, tag, f"it has no names for the {', '.join(lacking)} of {kind.title} modules"
        ).misfits
    misfits = tuple(_part(step, role) for role in lacking)
    magnitude = None if {"magnitude", "magnitude_in"} & set(lacking) else module.magnitude
    axis = module.magnitude_axis if magnitude is not None else None
    return module._replace(factors=left, magnitude=magnitude, magnitude_axis=axis), misfits


def _part(step: Step, role: str) -> Misfit:
    plain = "magnitude" if role == "magnitude_in" else role
    names = {"up_bias", "diff_b"} if plain in ("up_bias", "diff_b") else {plain}
    keys = tuple(ref.name for source in step.sources for each, ref in source.tensors() if each in names)
    said = "a magnitude per input" if role == "magnitude_in" else f"a {PARTS[role]}"
    return Misfit(PARTS[role], keys, f"it has no place for {said}")


def _bias_as_spelt(module: Module, form: Format, dtype: str) -> Module:
    """A bias beside the factors in the way that the layout has: multiplied by the scale (PEFT), or not (Kohya)."""
    factors = dict(module.factors)
    if "diff_b" in factors and "diff_b" not in form.roles and "up_bias" in form.roles and module.scale:
        if "up" in factors and "up_bias" not in factors:
            factors["up_bias"] = _rescaled(factors.pop("diff_b"), 1.0 / module.scale, dtype)
    elif (
        "up_bias" in factors
        and "up_bias" not in form.roles
        and "diff_b" in form.roles
        and "diff_b" not in factors
    ):
        factors["diff_b"] = _rescaled(factors.pop("up_bias"), module.scale, dtype)
    return module._replace(factors=factors)


def _rescaled(ref: TensorRef, factor: float, dtype: str) -> TensorRef:
    return ref if factor == 1.0 else _scale.times(ref, factor, dtype)


def _is_rescaled(before: Module, after: Module) -> bool:
    """Whether a bias was multiplied on its way into another role, so that it may have been rounded."""
    moved = {"up_bias", "diff_b"} & (after.factors.keys() - before.factors.keys())
    return bool(moved) and after.scale != 1.0


def _tag(module: Module, adapter: Adapter, form: Format) -> str:
    """What --drop calls a module that the layout cannot name: its component, where that has no place at all."""
    if form.single and module.target.component != _names.main_component(adapter):
        return module.target.component
    owner = _owner(module, adapter)
    if owner is not None and owner.table is not None and owner.prefix(form.name) is None:
        return module.target.component
    # A known weight's name is not what is in the way of another kind.
    return "unnamed" if module.kind in ("lora", "full") else module.kind
