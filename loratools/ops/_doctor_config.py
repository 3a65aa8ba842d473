"""Checks of adapter_config.json: what is missing, what contradicts the tensors, what depends on an order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from loratools.errors import LoraError
from loratools.formats._patterns import pattern as compiled
from loratools.formats._peft_checks import contradicted_method
from loratools.formats._peft_config import pattern_value
from loratools.formats._peft_special import refuse_changed_base
from loratools.ops import _doctor_mend as mend
from loratools.ops import _metadata
from loratools.ops._doctor_case import Case
from loratools.ops._doctor_fields import LORA_FIELDS
from loratools.ops.doctor_results import ERROR, INFO, WARNING, Finding, named

_PATTERNS = ("rank_pattern", "alpha_pattern")
# Modules of kinds that share tensors between all weights: they name the model, not a weight in it.
_NOWHERE = ("base_model", "(whole model)")


def missing(case: Case) -> Iterator[Finding]:
    """Weights of a layout whose scale is in a configuration, without one."""
    if case.config or case.layout not in ("peft", "mlx") or not case.modules:
        return
    scales = sorted({module.scale for module in case.modules})
    needed = case.runtime is not None and case.runtime.configured and case.layout in case.runtime.layouts
    yield Finding(
        "no-config",
        ERROR if needed else WARNING,
        f"no adapter_config.json lies beside it: a scale of {scales[0]:g} is assumed for all {len(case.modules)} "
        "modules",
        "The strength is stated there alone, and programs that load folders refuse one without it",
        "Put the configuration of the training beside the weights",
        mend.convert(case) if case.layout == "peft" else "",
    )


def ranks(case: Case) -> Iterator[Finding]:
    """Ranks that are not those of the configuration."""
    if not case.by_peft or not isinstance(case.config.get("r"), int) or _broken(case.config):
        return
    off: list[str] = []
    for name, module in case.by_name.items():
        stated = pattern_value(case.config.get("rank_pattern"), name, case.config["r"])
        if module.kind == "lora" and module.rank and stated != module.rank:
            off.append(f"{name}: {module.rank}, not {stated}")
    if off:
        yield Finding(
            "rank-contradicts",
            ERROR,
            f"{named(off, 'module', of=len(case.modules))} have another rank than adapter_config.json says",
            "PEFT makes its layers of the configuration's ranks, and then stops at tensors of other shapes; servers "
            "divide alpha by the wrong one",
            command=mend.convert(case, to="peft"),
            keys=tuple(off),
        )


def targets(case: Case) -> Iterator[Finding]:
    """Modules that target_modules leaves out, so that PEFT makes no layer for them."""
    stated = case.config.get("target_modules")
    if not case.by_peft or not stated or stated == "all-linear" or not isinstance(stated, str | list):
        return
    packed = bool(case.config.get("target_parameters"))
    try:
        off = [
            name
            for name, module in case.by_name.items()
            if module.target.path not in _NOWHERE
            and not (packed and module.kind == "experts")
            and not _is_targeted(name, stated)
        ]
    except re.error as error:
        yield _invalid("target_modules", str(stated), error)
        return
    if off:
        yield Finding(
            "targets-contradict",
            ERROR,
            f"{named(off, 'module', of=len(case.modules))} are not among the configuration's target_modules",
            "PEFT makes no layer for them, and passes over their factors with a warning",
            "List them in target_modules of adapter_config.json",
            keys=tuple(off),
        )


def _is_targeted(name: str, stated: str | list[str]) -> bool:
    if isinstance(stated, str):
        return compiled(stated).matches(name)
    return any(name == each or name.endswith(f".{each}") for each in stated)


def method(case: Case) -> Iterator[Finding]:
    """A configuration of another method than the tensors'."""
    said = contradicted_method(case.config, {module.kind for module in case.modules}) if case.by_peft else ""
    if case.layout == "mlx" and case.config.get("fine_tune_type") == "full" and case.modules:
        yield Finding(
            "method-contradicts",
            ERROR,
            "fine_tune_type of adapter_config.json is full, its tensors are factors",
            "mlx-lm makes no layers for factors then, and passes over them",
            "Set fine_tune_type to lora, or to dora where there are magnitudes",
            keys=("fine_tune_type",),
        )
    if said:
        yield Finding(
            "method-contradicts",
            ERROR,
            said,
            "PEFT makes the layers of the method that is stated, and passes over the tensors of another",
            "Correct peft_type in adapter_config.json",
            keys=("peft_type",),
        )


def dora(case: Case) -> Iterator[Finding]:
    """Magnitudes without use_dora, or use_dora without magnitudes."""
    if not case.by_peft or str(case.config["peft_type"]).upper() != "LORA" or not case.modules:
        return
    held = [name for name, module in case.by_name.items() if module.magnitude is not None]
    if bool(held) == bool(case.config.get("use_dora")):
        return
    said = (
        f"{named(held, 'module', of=len(case.modules))} have a magnitude, but use_dora is not set"
        if held
        else f"use_dora is set, but none of {len(case.modules)} modules has a magnitude"
    )
    yield Finding(
        "dora-contradicts",
        ERROR,
        said,
        "PEFT goes by the configuration: it passes over magnitudes that it makes no place for, and fills missing ones "
        "with the base's own norms",
        f"Set use_dora to {'true' if held else 'false'} in adapter_config.json",
        keys=tuple(held),
    )


def whole(case: Case) -> Iterator[Finding]:
    """Modules that are said to be saved in full, and are not there."""
    stated = case.config.get("modules_to_save")
    if not case.by_peft or not isinstance(stated, list) or not case.tensors:
        return
    absent = [name for name in stated if not any(f".{name}." in f".{key}" for key in case.tensors)]
    if absent:
        # For classifiers PEFT lists the usual names of their heads, of which a model has but one.
        some = len(absent) < len(stated)
        yield Finding(
            "whole-missing",
            INFO if some else ERROR,
            f"no tensors are there for {named(absent, 'name', of=len(stated))} in modules_to_save",
            "The base's own weights are used for them, if it has such modules"
            if some
            else "What was trained of these modules is not in the file: the base's own weights are used",
            "Save the adapter again from where it was trained, or take them out of modules_to_save",
            keys=tuple(absent),
        )


def patterns(case: Case) -> Iterator[Finding]:
    """Patterns that do not compile, or whose order decides."""
    for field in _PATTERNS:
        stated = case.config.get(field)
        for pattern in stated if isinstance(stated, Mapping) else ():
            try:
                compiled(pattern)
            except re.error as error:
                yield _invalid(field, pattern, error)
    for said in _metadata.patterns(case.config, case.by_name) if case.by_peft else ():
        yield Finding(
            "pattern-order",
            WARNING,
            said,
            "Loading and saving it with PEFT may change ranks or scales",
            command=mend.convert(case, to="peft"),
            keys=(said.partition(" ")[0],),
        )


def _invalid(field: str, pattern: str, error: re.error) -> Finding:
    return Finding(
        "pattern-invalid",
        ERROR,
        f"{field} has {pattern!r}, which is no regular expression: {error}",
        "PEFT stops when it tries to match it",
        f"Escape it, or mend it, in {field} of adapter_config.json",
        keys=(field,),
    )


def _broken(config: Mapping[str, object]) -> bool:
    """Whether rank_pattern is not even a mapping, of which the reader has told."""
    stated = config.get("rank_pattern")
    return stated is not None and not isinstance(stated, Mapping)


def fields(case: Case) -> Iterator[Finding]:
    """Fields that PEFT's LoraConfig does not have."""
    if str(case.config.get("peft_type", "")).upper() != "LORA":
        return
    unknown = sorted(set(case.config) - LORA_FIELDS)
    if unknown:
        yield Finding(
            "unknown-fields",
            WARNING,
            f"{named(unknown, 'field')} of adapter_config.json are not PEFT's",
            "Programs pass over fields that they do not know, or stop: what they say has no effect",
            "Take them out, unless the program that wrote them is the one that reads them",
            keys=tuple(unknown),
        )


def mutated(case: Case) -> Iterator[Finding]:
    """Factors that belong to a base which an initialisation has changed, or that repeats layers."""
    if case.adapter is None or not case.by_peft:
        return
    try:
        refuse_changed_base(case.adapter)
    except LoraError as error:
        yield Finding(
            "mutated-base",
            WARNING,
            error.problem,
            "Merged into or served with the base as it was published, it does something else than it was trained to",
            error.todo,
            keys=("layer_replication" if "layer_replication" in error.problem else "init_lora_weights",),
        )


def beside(case: Case) -> Iterator[Finding]:
    """Weights of the base that PEFT saves with adapted embeddings."""
    keys = [key for key in case.extras if ".base_layer." in key]
    if keys:
        yield Finding(
            "base-layer",
            INFO,
            f"{named(keys, 'weight')} of the base lie beside the factors",
            "They are the base's own and count for nothing, unless the vocabulary was resized before the training",
            keys=tuple(keys),
        )
