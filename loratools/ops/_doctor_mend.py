"""The command lines that mend what was found, of options that there are."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence

from loratools import formats, kinds
from loratools.model import Module
from loratools.ops import _doctor_features
from loratools.ops._doctor_case import Case
from loratools.runtimes import Runtime

_BASE = "BASE"

# What helps against each feature that a program does not hold, where the program has no normal form to convert to.
_WAYS: Mapping[str, str] = {
    "ranks": "one rank",
    "layer_ranks": "one rank",
    "scales": "fold",
    "rslora": "fold",
    "header_scale": "fold",
    "dora": "lora",
    "dora_scale": "layout",
    "dora_vector": "layout",
    "wrapped": "layout",
    "default_name": "layout",
    "mid": "lora",
    "bias": "bake",
    "lora_bias": "bake",
    "whole": "bake",
    "embedding": "bake",
    "tokens": "bake",
    "conv": "bake",
    "fused_experts": "bake",
    "split_experts": "bake",
}
# Whole tensors, which a normal form has beside it; what they are computed from may be the base's own.
_APART = ("whole", "bias", "lora_bias", "tokens")
_FROM_BASE = ("dora", "lora_bias", "tokens")
# The other style of experts, into which a form brings them where the program has but that.
_OTHER_STYLE: Mapping[str, str] = {"fused_experts": "split_experts", "split_experts": "fused_experts"}
LOST = "Use it with PEFT; or save it again with all that its ΔW is made of"
"""What to do about modules whose ΔW the file does not tell."""
_WORDS: Mapping[str, str] = {
    "mutated_base": "Save it with PEFT's path_initial_model_for_weight_conversion, or serve the changed base",
    "layer_replication": "Use it with PEFT, which repeats the base's layers",
    "alora": "Use it with a program that knows aLoRA",
    "variant": "Use it with PEFT, which knows this method",
    "regex_targets": "List the names of the modules in target_modules of adapter_config.json",
}


def words(feature: str) -> str:
    """What to do about a feature where no command helps, or empty."""
    return _WORDS.get(feature, "")


def for_feature(case: Case, feature: str) -> str:
    """The command that turns what the program does not hold into what it does; empty where there is none."""
    way = _WAYS.get(feature, "")
    if not way:
        return ""
    if case.runtime is not None and case.runtime.normal:
        return convert(case)
    if way == "one rank":
        return one_rank(case)
    if way == "fold":
        return convert(case, "--fold")
    if way == "lora":
        return convert(case, "--as", "lora", base=True)
    return bake(case) if way == "bake" else convert(case)


def for_layout(case: Case) -> tuple[str, str]:
    """What to do about a layout that the program does not read, in words and as a command."""
    if case.runtime is not None and lost(case.modules, case.runtime):
        return LOST, ""
    way = convert(case)
    return ("", way) if way else ("Bake it into its base model, and convert that", bake(case))


def for_kinds(case: Case, modules: Sequence[Module]) -> str:
    """The command that makes of modules of other kinds what the program applies."""
    if case.runtime is not None and case.runtime.normal:
        return convert(case)
    return convert(case, "--as", "lora", base=any(kinds.get(module.kind).needs_base for module in modules))


def lost(modules: Iterable[Module], runtime: Runtime) -> list[Module]:
    """Modules of kinds that a program does not apply, and whose ΔW the file does not tell, or nobody can compute."""
    others = [module for module in modules if module.kind not in runtime.kinds]
    return [module for module in others if _is_lost(module)]


def _is_lost(module: Module) -> bool:
    kind = kinds.get(module.kind)
    unsized = module.rank is None and kind.shape(module.factors) is None
    return kind.dense is None or (unsized and not kind.needs_base)


def target(case: Case) -> str:
    """What to convert to: the program's name where it has a normal form, its layout, or the adapter's own.

    Returns:
        Empty where the program's layouts are only read, or not known.
    """
    runtime = case.runtime
    if runtime is None:
        return case.layout if case.layout in formats.writable() else "peft"
    if runtime.normal:
        return runtime.name
    if case.layout in runtime.layouts and case.layout in formats.writable():
        return case.layout
    return runtime.layouts[0] if runtime.layouts[0] in formats.writable() else ""


def convert(case: Case, *options: str, to: str = "", base: bool = False) -> str:
    """``loratools convert``, or empty where there is no layout to convert to.

    For a program's normal form it is one line that mends all that can be mended, whichever finding asks for it.

    Args:
        case: The adapter.
        options: Further ones.
        to: The layout; default: what the program reads.
        base: Whether the base has to be given.
    """
    layout = to or target(case)
    if not layout:
        return ""
    if not to and _must_be_baked(case):
        return bake(case)
    wanted = base or (not to and _wants_base(case))
    with_base = ("--base", case.usable_base or _BASE) if wanted or case.usable_base else ()
    more = options if to else (*options, *_apart(case))
    return _line("convert", case.path, "-o", _output(case, layout), "--to", layout, *more, *with_base)


def _unheld(case: Case) -> list[str]:
    """The features that a program with a normal form does not hold, and that tensors show."""
    runtime = case.runtime
    if runtime is None or not runtime.normal:
        return []
    used = _doctor_features.used(case)
    return [feature for feature, each in used.items() if not each.stated and not runtime.holds(feature)]


def _is_restyled(case: Case, feature: str) -> bool:
    """Whether these are experts in a style that the program's form turns into its own."""
    other = _OTHER_STYLE.get(feature, "")
    return bool(other) and case.runtime is not None and case.runtime.holds(other)


def _must_be_baked(case: Case) -> bool:
    """Whether the program has nothing for a part of the adapter that its normal form could use."""
    return any(
        _WAYS.get(feature) == "bake" and feature not in _APART and not _is_restyled(case, feature)
        for feature in _unheld(case)
    )


def _wants_base(case: Case) -> bool:
    """Whether the program's form cannot be made without the base."""
    runtime = case.runtime
    if runtime is None or not runtime.normal:
        return runtime is not None and runtime.by_base
    unheld = _unheld(case)
    others = [kinds.get(module.kind) for module in case.modules if module.kind not in runtime.kinds]
    return (
        runtime.by_base
        or any(kind.needs_base for kind in others)
        or any(feature in unheld for feature in _FROM_BASE)
    )


def _apart(case: Case) -> tuple[str, ...]:
    """The option for whole tensors that a normal form does not hold; none where there are none."""
    there = any(feature in _APART for feature in _unheld(case))
    return ("--full-weights", f"{_stem(case.path)}-{target(case)}-full.safetensors") if there else ()


def resize(case: Case, rank: int, *options: str) -> str:
    """``loratools resize --rank``."""
    own = case.layout in formats.writable()
    layout = case.layout if own else "peft"
    to = () if own else ("--to", layout)
    return _line(
        "resize", case.path, "-o", _output(case, layout, f"-r{rank}"), "--rank", str(rank), *to, *options
    )


def one_rank(case: Case) -> str:
    """All modules at one rank, the largest there is, padded with zeros."""
    return resize(case, max((module.rank or 1 for module in case.modules), default=1), "--to-rank-of", "vllm")


def bake(case: Case) -> str:
    """``loratools bake``: whatever a program does not apply is then in the weights."""
    output = f"{_stem(case.path)}-baked"
    return _line("bake", case.usable_base or _BASE, case.path, "-o", output)


def _line(*words: str) -> str:
    return shlex.join(("loratools", *words))


def _output(case: Case, layout: str, mark: str = "") -> str:
    """A name for the result that is nobody's yet, as far as names tell."""
    # A program's name stands for its first layout.
    own = layout if layout in formats.writable() or case.runtime is None else case.runtime.layouts[0]
    name, form = f"{_stem(case.path)}{mark or f'-{layout}'}", formats.get(own)
    return name if form.folder else f"{name}.{form.container}"


def _stem(path: str) -> str:
    plain = path.rstrip("/\\") or path
    return plain if os.path.isdir(plain) else os.path.splitext(plain)[0]
