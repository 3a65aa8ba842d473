"""What is wrong with an adapter_config.json: values of another type, patterns that are none, modules it leaves out."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from loratools.errors import MalformedFileError
from loratools.formats import _peft_config, _peft_methods
from loratools.formats._base import Facts
from loratools.formats._group import clean
from loratools.formats._patterns import pattern as compiled
from loratools.io.json_text import brief
from loratools.model import Adapter, Module

_FILE = "adapter_config.json"
_PATTERNS = ("rank_pattern", "alpha_pattern")
# Kinds whose configurations have masks, or nothing of the sort, under these names.
_UNRANKED = ("ADALORA",)
# By kind, the methods that have its tensors, the usual one first.
_METHODS: Mapping[str, tuple[str, ...]] = {
    **{kind: (method,) for kind, method in _peft_methods.TYPES.items()},
    "lora": ("LORA", "ADALORA", "XLORA"),
    "adalora": ("ADALORA",),
}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_names_or_pattern(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


# What ΔW depends on: the field, what it has to be, and how that is called.
_FIELDS: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("r", _is_whole, "a whole number"),
    ("lora_alpha", _is_number, "a number"),
    ("use_rslora", lambda value: isinstance(value, bool), "true or false"),
    ("use_dora", lambda value: isinstance(value, bool), "true or false"),
    ("fan_in_fan_out", lambda value: isinstance(value, bool), "true or false"),
    ("rank_pattern", lambda value: _is_mapping_of(value, _is_whole), "an object of whole numbers by pattern"),
    ("alpha_pattern", lambda value: _is_mapping_of(value, _is_number), "an object of numbers by pattern"),
    ("target_modules", _is_names_or_pattern, "a list of names, or a pattern"),
    ("target_parameters", _is_names, "a list of names"),
)
# What is looked into whatever the method: its fields of these names are of these types, or nobody's.
_ANY: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("peft_type", lambda value: isinstance(value, str), "the name of a method"),
    ("base_model_name_or_path", lambda value: isinstance(value, str), "a name"),
    ("rank_pattern", lambda value: isinstance(value, Mapping), "an object by pattern"),
    ("alpha_pattern", lambda value: isinstance(value, Mapping), "an object by pattern"),
    ("target_modules", _is_names_or_pattern, "a list of names, or a pattern"),
    ("modules_to_save", _is_names, "a list of names"),
    ("lora_parameters", lambda value: isinstance(value, Mapping), "an object"),
)


def _is_mapping_of(value: object, test: Callable[[object], bool]) -> bool:
    return isinstance(value, Mapping) and all(map(test, value.values()))


def refuse_malformed(config: Mapping[str, Any], path: str) -> None:
    """Refuse a configuration in which a field that is looked into is of another type than PEFT and mlx-lm write.

    Args:
        config: adapter_config.json; of LoRA's, all that ΔW depends on is looked at.
        path: The weights beside it, for the message.

    Raises:
        MalformedFileError: It is such; all such fields are named with their values.
    """
    of_lora = str(config.get("peft_type", "")).upper() == "LORA"
    wrong = {
        field: (config[field], meant)
        for field, test, meant in (*_ANY, *(_FIELDS if of_lora else ()))
        if config.get(field) is not None and not test(config[field])
    }
    if wrong:
        field, (value, meant) = next(iter(wrong.items()))
        more = f" (and {len(wrong) - 1} other fields)" if len(wrong) > 1 else ""
        raise MalformedFileError(
            f"{field} of {_FILE} is {brief(value)}{more}",
            path=path or None,
            keys=wrong,
            expected=f"For {field}, {meant} was expected",
            todo=f"Correct it in {_FILE}; the configuration of the training has the true one",
        )


def refuse_contradicted(adapter: Adapter) -> None:
    """Refuse an adapter whose tensors have another rank than its configuration says: which scale was trained is open.

    Args:
        adapter: One that was computed here has true ranks, whatever its former configuration says, and passes.

    Raises:
        MalformedFileError: It is such; all modules concerned are named.
    """
    config = adapter.config
    if str(config.get("peft_type", "")).upper() != "LORA" or not adapter.order:
        return
    off: dict[str, tuple[int, int]] = {}
    for module in adapter.modules.values():
        down = module.factors.get("down")
        if module.kind != "lora" or down is None or ".lora_" not in down.name:
            continue
        name = clean(down.name.rpartition(".lora_")[0])
        stated = _peft_config.pattern_value(config.get("rank_pattern"), name, config.get("r"))
        if _is_whole(stated) and module.rank and stated != module.rank:
            off[name] = stated, module.rank
    if off:
        name, (stated, rank) = next(iter(off.items()))
        raise MalformedFileError(
            f"{_FILE} says rank {stated} for {name}, its tensors have rank {rank}",
            path=adapter.path or None,
            keys=off,
            expected="The rank that alpha was divided by in the training was expected: ΔW is scaled by alpha / rank",
            todo=f"Correct r or rank_pattern in {_FILE}, and lora_alpha where ranks were changed after the training; "
            "`loratools convert IN -o OUT --to peft` takes the tensors' ranks for true",
        )


def notes(facts: Facts, modules: Collection[Module]) -> Iterator[str]:
    """Where a configuration is not what PEFT could read, or not of these tensors."""
    config = facts.config
    if "peft_type" not in config:
        if config and any(key.startswith("base_model.") for key in facts.keys):
            yield f"{_FILE} states no peft_type, without which PEFT stops; that of the tensors is assumed"
        return
    said = contradicted_method(config, {module.kind for module in modules})
    if said:
        yield f"{said}; it is read as what its tensors are"
    if str(config["peft_type"]).upper() not in _UNRANKED:
        yield from _uncompiled(config)
    off = _untargeted(facts, modules)
    if off:
        yield (
            f"{len(off)} of {len(modules)} modules are not among {_FILE}'s target_modules (first: {off[0]}): PEFT "
            "passes over their tensors"
        )


def contradicted_method(config: Mapping[str, Any], kinds: Collection[str]) -> str:
    """How a configuration names another method than the one that the tensors are of; empty where it does not.

    Args:
        config: adapter_config.json.
        kinds: Of the modules, as loratools calls them.
    """
    stated = str(config.get("peft_type"))
    meant = sorted({_METHODS[kind][0] for kind in kinds if kind in _METHODS})
    if not meant or any(stated.upper() in _METHODS[kind] for kind in kinds if kind in _METHODS):
        return ""
    return f"peft_type of {_FILE} is {stated}, its tensors are those of {' and '.join(meant)}"


def _uncompiled(config: Mapping[str, Any]) -> Iterator[str]:
    """Patterns that are no regular expressions."""
    stated = [(field, pattern) for field in _PATTERNS for pattern in config.get(field) or ()]
    targets = config.get("target_modules")
    if isinstance(targets, str):
        stated.append(("target_modules", targets))
    for field, pattern in stated:
        try:
            compiled(str(pattern))
        except re.error as error:
            yield (
                f"{field} of {_FILE} has {brief(pattern)}, which is no regular expression ({error}): PEFT stops at "
                "it; it is taken for a plain name here"
            )


def _untargeted(facts: Facts, modules: Collection[Module]) -> list[str]:
    """Modules that ``target_modules`` leaves out, by PEFT's rule: a whole match, or a dotted tail."""
    stated = facts.config.get("target_modules")
    if not stated or stated == "all-linear" or {module.kind for module in modules} - {"lora"}:
        return []
    names = [
        found.name for found in facts.groups.values() if "up" in found.roles or "embedding_up" in found.roles
    ]
    if isinstance(stated, str):
        try:
            rule = compiled(stated)
        except re.error:
            return []
        return [name for name in names if not rule.matches(name)]
    tails = {str(each) for each in stated}
    return [name for name in names if not _has_tail(name, tails)]


def _has_tail(name: str, tails: Collection[str]) -> bool:
    if name in tails:
        return True
    starts = [match.end() for match in re.finditer(r"\.", name)]
    return any(name[start:] in tails for start in starts)
