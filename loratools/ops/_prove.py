"""What a conversion has to leave as it is, and the comparison that proves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loratools import kinds
from loratools.errors import ConversionError, NonFiniteError
from loratools.model import Adapter, Module, Target
from loratools.ops import _fit
from loratools.ops._fit import PARTS
from loratools.ops._weights_of import least_precise, weight_of
from loratools.ops.results import Conversion
from loratools.tensors import DTYPES

if TYPE_CHECKING:
    from loratools.ops._probe import Probed
    from loratools.ops.convert import Converted


def provable(origins: Mapping[Target, Module], conversions: Sequence[Conversion]) -> dict[Target, Module]:
    """Modules that became LoRA exactly, whose former ΔW can be compared with the result's: it needs no base."""
    return {
        target: module
        for (target, module), each in zip(origins.items(), conversions, strict=True)
        if each.exact and module.magnitude is None and not kinds.get(module.kind).needs_base
    }


def expected(
    fitted: Sequence[_fit.Fitted], provable: Mapping[Target, Module], ready: Adapter
) -> list[Module]:
    """What the result is compared with: the input's own modules, or their pieces where something was left out.

    Modules of which nothing is written are among them: they must change nothing.
    """
    by_weight: dict[tuple[str, str], list[_fit.Fitted]] = {}
    for each in fitted:
        target = each.step.module.target
        by_weight.setdefault((target.component, target.path), []).append(each)
    found: dict[Target, Module] = {}
    for group in by_weight.values():
        # Where a module of a weight is left out, its sources may have other rows that stay.
        lost = any(each.misfits and each.module is None for each in group)
        for each in group:
            if each.module is None:
                continue
            if lost:
                found[each.module.target] = each.module
                continue
            left = {misfit.tag for misfit in each.misfits}
            for source in each.step.sources:
                found[source.target] = _without(provable.get(source.target, source), left)
    touched = {source.target for each in fitted for source in each.step.sources}
    rest = [module for target, module in ready.modules.items() if target not in touched]
    return [*found.values(), *rest]


def _without(module: Module, tags: set[str]) -> Module:
    """A module as it was read, without the parts that were dropped."""
    if not tags:
        return module
    gone = {role for role, tag in PARTS.items() if tag in tags}
    factors = {role: ref for role, ref in module.factors.items() if role not in gone}
    if "magnitude" in tags:
        module = module._replace(magnitude=None, magnitude_axis=None)
    return module._replace(factors=factors)


def rounded(
    fitted: Sequence[_fit.Fitted], store: str, arch: str, provable: Mapping[Target, Module]
) -> dict[tuple[str, str], str]:
    """The weights whose values may have been rounded, and to which store dtype."""
    found: dict[tuple[str, str], str] = {}
    for each in fitted:
        if each.module is None:
            continue
        written = least_precise(each.module)
        # What was folded or fused is in the store dtype already.
        if store and any(_cuts(module, store) for module in (each.module, *each.step.sources)):
            found[weight_of(each.module, arch)] = store
        elif each.rounded or any(source.target in provable for source in each.step.sources):
            found[weight_of(each.module, arch)] = store or written
    return found


def _cuts(module: Module, store: str) -> bool:
    """Whether a store dtype may round a module's values."""
    exact = {store, "F16", "BF16"} if DTYPES[store].bits > 16 else {store}
    exact |= {"F32"} if store == "F64" else set()
    return any(ref.dtype not in exact for ref in module.factors.values() if DTYPES[ref.dtype].floating)


def verify(adapter: Adapter, converted: Converted, after: Adapter) -> Probed:
    """Compare what was to be written with what was read back, by random probes.

    Raises:
        ConversionError: ΔW differs by more than rounding explains; the message names the weights.
    """
    found = compared(converted, after)
    refuse_changes(adapter, found)
    return found


def compared(converted: Converted, after: Adapter) -> Probed:
    """What random probes find of the differences between what was to be written and what was read back."""
    from loratools.ops import _moe_known, _moe_single, _probe, _reread, _row_orders

    if converted.reordered:
        after = _row_orders.as_transformers(after, converted.host)
    after = _reread.under(after, converted.renamed)
    arch = converted.adapter.arch
    told, kept = converted.experts, converted.adapter.modules.values()
    after = _moe_known.known(after, told.total if _moe_single.has_fused(kept) else None)
    if not _moe_single.has_fused((*converted.expected, *after.modules.values())):
        return _probe.compare(arch, converted.expected, after.modules.values(), converted.rounded)
    mine, theirs = (_moe_single.singly(each, told) for each in (converted.expected, after.modules.values()))
    rounded_ones = [(converted.rounded.get(weight_of(module, arch)), module) for module in kept]
    rounded_now = {
        weight_of(part, arch): dtype
        for dtype, module in rounded_ones
        if dtype is not None
        for part in _moe_single.singly([module], told)
    }
    return _probe.compare(arch, mine, theirs, rounded_now)


def refuse_changes(adapter: Adapter, found: Probed) -> None:
    """Refuse a result whose ΔW differs.

    Raises:
        NonFiniteError: Factors of the input are no numbers, so that nothing can be said of what they do.
        ConversionError: ΔW differs by more than rounding explains; the message names the weights.
    """
    if found.failed:
        keys = _nonfinite(adapter)
        if keys:
            raise NonFiniteError(
                f"{len(keys)} tensors hold NaN or infinity: what they do cannot be compared",
                path=adapter.path or None,
                keys=keys,
                todo="The file is damaged; get it again from where it was made, or pass --no-verify",
            )
        raise ConversionError(
            f"ΔW of {len(found.failed)} of {found.weights} weights would change",
            path=adapter.path or None,
            keys=found.failed,
            expected="A conversion leaves ΔW as it is, up to the rounding of the store dtype",
            todo="Nothing was written. Choose a wider --dtype if values are too small or too large for this one; "
            "otherwise this is a fault of loratools that should be reported",
        )


def _nonfinite(adapter: Adapter) -> list[str]:
    """The keys of floating tensors that hold NaN or infinity."""
    import torch

    refs = [ref for module in adapter.modules.values() for _, ref in module.tensors()]
    return [
        ref.name
        for ref in refs
        if DTYPES[ref.dtype].floating and not torch.isfinite(ref.load().float()).all()
    ]
