"""What a merge was asked for, checked before any work is done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loratools import formats, kinds, methods
from loratools.errors import LayoutError, OptionError, UnsupportedKindError
from loratools.model import Adapter, Layout, Module
from loratools.ops import align, files
from loratools.ops._device import usable
from loratools.ops._extras_base import BaseModel
from loratools.ops._extras_rows import REFUSE
from loratools.ops._extras_ways import checked_way
from loratools.ops._merge_steps import Steps, checked
from loratools.ops._weights import Spec, Weights

# Broken or superseded spellings are not written anew: their layout's present one is.
_PRESENT = {
    ("kohya", "malformed"): "",
    ("kohya", "lycoris"): "",
    ("diffusers", "attn-procs"): "peft-keys",
    ("peft", "wrapped"): "",
    ("peft", "no-prefix"): "",
}


# Tensors beside a LoRA's factors that its ΔW has and no merge method takes.
_BESIDE = {"diff", "bias_indices", "bias_values", "bias_size"}


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Everything a merge was asked for.

    Attributes:
        adapters: The inputs.
        weights: One per input.
        weigh: What the module of an input at a target is multiplied by.
        method: The merge method.
        options: Its options.
        layout: The layout of the result.
        arch: The inputs' common architecture.
        dtype: Store dtype (a key of ``tensors.DTYPES``), or None to keep the inputs'.
        device: Where to compute.
        allow_nonfinite: Whether NaN and Inf in factors are let through.
        alpha: What every computed module states, or None for its own rank.
        steps: What is done before and after the method.
        said: What else the caller said and a recipe repeats, as JSON has it.
        base: The model that the inputs were trained on, or None.
        way: What is done with modules that several inputs hold in full; see ``_extras``.
    """

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    weigh: Weights
    method: methods.Method
    options: methods.Options
    layout: Layout
    arch: str
    dtype: str | None
    device: str
    allow_nonfinite: bool
    alpha: float | None
    steps: Steps
    said: Mapping[str, Any]
    base: BaseModel | None
    way: str


def request(
    adapters: Sequence[Adapter],
    *,
    weights: Sequence[float] | None,
    component_weights: Sequence[Spec],
    block_weights: Sequence[Spec],
    weight_for: Mapping[str, float | str],
    steps: Steps,
    method: str,
    rank: int | None,
    layout: str | None,
    dtype: str,
    device: str,
    allow_nonfinite: bool,
    options: Mapping[str, Any],
    said: Mapping[str, Any],
    base: BaseModel | None = None,
    full_modules: str | int = REFUSE,
) -> Request:
    """Check everything that does not need the tensors.

    Raises:
        OptionError: Options that contradict each other or the inputs.
        ArchitectureError: The inputs are of different architectures.
        LayoutError: The layout cannot be written.
    """
    given = _given(adapters, weights)
    if dtype != "keep" and dtype not in files.STORE_DTYPES:
        raise OptionError(f"there is no store dtype {dtype!r}", candidates=[*files.STORE_DTYPES, "keep"])
    chosen = _method(method, len(adapters))
    arch = align.common_arch([*adapters, *steps.styles])
    target_layout = written_layout(adapters, layout)
    return Request(
        adapters=tuple(adapters),
        weights=given,
        weigh=Weights(
            adapters,
            arch,
            given,
            components=component_weights,
            blocks=block_weights,
            patterns=weight_for,
        ),
        method=chosen,
        options=_options(chosen, rank, options),
        layout=target_layout,
        arch=arch,
        dtype=None if dtype == "keep" else files.STORE_DTYPES[dtype],
        device=usable(device, auto=fastest(chosen), wanted=torch.float64),
        allow_nonfinite=allow_nonfinite,
        alpha=_common_alpha(adapters, rank) if target_layout.name == "kohya" else None,
        steps=checked(steps, adapters),
        said=said,
        base=base,
        way=checked_way(full_modules, len(adapters), based=base is not None),
    )


def _given(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> tuple[float, ...]:
    """One finite weight for each input.

    Raises:
        OptionError: There are no inputs, or weights of another count, or one that is not finite.
    """
    if not adapters:
        raise OptionError("there is nothing to merge", expected="At least one adapter was expected")
    given = tuple(float(weight) for weight in weights) if weights is not None else (1.0,) * len(adapters)
    if len(given) != len(adapters):
        raise OptionError(
            f"{len(given)} weights for {len(adapters)} inputs",
            expected="One weight for each input was expected",
        )
    bad = [str(weight) for weight in given if not math.isfinite(weight)]
    if bad:
        raise OptionError("a weight is not a finite number", keys=bad)
    return given


def _common_alpha(adapters: Sequence[Adapter], rank: int | None) -> float:
    """One alpha for all modules of a Kohya file: most modules' rank, as far as it can be told beforehand.

    Any would do, as the factors make up for it. Some readers (diffusers 0.42) apply the commonest alpha to all
    modules of a file, which is right if there is only one.
    """
    counts = [Counter(module.rank for module in adapter.modules.values()) for adapter in adapters]
    usual = sum(found.most_common(1)[0][0] or 0 for found in counts if found)
    return float(min(rank, usual) if rank and usual else rank or usual or 1)


def _method(name: str, count: int) -> methods.Method:
    chosen = methods.get(name)
    if chosen.most is not None and count > chosen.most:
        able = [other for other, method in methods.methods().items() if method.most is None]
        raise OptionError(
            f"{count} inputs for {name}",
            expected=f"{name} takes at most {chosen.most}",
            todo=f"Merge them in steps, or with a method that takes any number: {', '.join(able)}",
        )
    return chosen


def _options(method: methods.Method, rank: int | None, given: Mapping[str, Any]) -> methods.Options:
    fields = {option.field: option.name for option in method.options}
    if rank is not None and "rank" not in fields:
        raise OptionError(
            f"{method.name} was given rank {rank}",
            expected=f"The rank of its result follows from the inputs; its options: "
            f"{', '.join(fields.values()) or 'none'}",
            todo="Use linear with --rank for the nearest sum at a rank of your choice",
        )
    return methods.options(method, rank=rank, **given)


def written_layout(adapters: Sequence[Adapter], name: str | None) -> Layout:
    """The layout of the result: the one named, else that of the first input; refused where it cannot be written."""
    first = adapters[0]
    wanted = name or first.layout.name
    form = formats.get(wanted) if wanted != "unknown" else None
    if form is None or form.speller is None:
        raise LayoutError(
            f"the {form.title if form else 'unknown'} layout can be read but not written yet",
            path=first.path or None,
            expected=f"Layouts that can be written: {', '.join(formats.writable())}",
            todo="Choose one of them with --to",
        )
    if wanted != first.layout.name:
        return Layout(wanted, "peft-keys" if wanted == "diffusers" else "")
    components = {target.component for adapter in adapters for target in adapter.modules}
    if (wanted, first.layout.variant) == ("diffusers", "no-prefix") and len(components) > 1:
        # Without prefixes a second component would have no name of its own.
        return Layout(wanted, "peft-keys")
    return Layout(wanted, _PRESENT.get((wanted, first.layout.variant), first.layout.variant))


def fastest(method: methods.Method) -> str:
    """What "auto" means: the CPU for lossless methods, whose small matrices cost more to move than to compute with."""
    return "cuda" if not method.lossless and torch.cuda.is_available() else "cpu"


def refuse(asked: Request) -> None:
    """Refuse modules that cannot be merged, all of them named at once.

    Raises:
        UnsupportedKindError: Modules of other kinds than LoRA.
        OptionError: There are no modules.
    """
    everything = (*asked.adapters, *asked.steps.styles)
    modules = [(adapter, module) for adapter in everything for module in adapter.modules.values()]
    if not any(adapter.modules for adapter in asked.adapters):
        raise OptionError("the inputs have no modules")
    other = [(adapter, module) for adapter, module in modules if not _is_low_rank(module)]
    if other:
        titles = sorted({_title(module) for _, module in other})
        raise UnsupportedKindError(
            f"{len(other)} modules are {' and '.join(titles)}, which cannot be merged yet",
            path=other[0][0].path or None,
            keys=[str(module.target) for _, module in other],
            expected="Only LoRA and LoCon modules can be merged",
        )


def _is_low_rank(module: Module) -> bool:
    return kinds.get(module.kind).low_rank and not _BESIDE & module.factors.keys()


def _title(module: Module) -> str:
    beside = sorted(_BESIDE & module.factors.keys())
    return (
        f"{kinds.get(module.kind).title} with {' and '.join(beside)}"
        if beside
        else kinds.get(module.kind).title
    )
