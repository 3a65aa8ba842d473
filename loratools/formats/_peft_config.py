"""adapter_config.json: the scale it gives each module, and a true one for modules that are to be written.

Sources: PEFT ``tuners/lora/config.py`` and ``tuners/tuners_utils.py``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

from loratools.errors import MalformedFileError
from loratools.formats._base import Scale
from loratools.formats._patterns import Pattern
from loratools.formats._patterns import pattern as compiled
from loratools.model import Module
from loratools.tensors import TensorRef

# What a LoraConfig says that the modules themselves say again.
_TOLD_AGAIN: dict[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "layers_to_transform": None,
    "layers_pattern": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
}
# What it says of how the factors began, which is not true of computed ones.
_TRAINING: dict[str, Any] = {
    "loftq_config": {},
    "corda_config": None,
    "eva_config": None,
    "lora_ga_config": None,
    "init_lora_weights": True,
}
# PEFT's defaults for OFT: how many terms of a series, and the limit of the constrained form.
_TERMS, _EPS = 5, 6e-5
# What PEFT adds to the rank that AdaLoRA divides by.
_PRUNED = 1e-5
# What configurations of all of PEFT's methods say.
_SHARED = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version")


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches, by PEFT's rule: the key may be any dotted tail of the name."""
    if patterns is not None and not isinstance(patterns, Mapping):
        raise MalformedFileError(
            f"adapter_config.json: a pattern is {patterns!r}", expected="An object of patterns was expected"
        )
    if not patterns:
        return default
    rules = tuple(patterns)
    first = rules_of(rules).first(module)
    return default if first is None else patterns[rules[first]]


@lru_cache(maxsize=8)
def rules_of(patterns: tuple[str, ...]) -> Rules:
    """Patterns made ready to be matched against every module of a file."""
    return Rules(patterns)


class Rules:
    """Patterns by PEFT's rule. Most are plain names, one for each module: these are looked up, not tried in turn."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._plain: dict[str, int] = {}
        self._others: list[tuple[int, Pattern]] = []
        for number, pattern in enumerate(patterns):
            if re.fullmatch(r"\^?(?:[\w-]|\\[\W_])+", pattern):
                self._plain.setdefault(re.sub(r"\\(\W)", r"\1", pattern), number)
                continue
            try:
                self._others.append((number, compiled(pattern, tail=True)))
            except re.error:  # taken for a plain name
                self._plain.setdefault(pattern, number)

    def first(self, module: str) -> int | None:
        """The number of the first pattern that matches a module's dotted name."""
        tails = [module, *(module[match.end() :] for match in re.finditer(r"\.", module))]
        found = [self._plain[tail] for tail in ("^" + module, *tails) if tail in self._plain]
        least = min(found, default=None)
        for number, pattern in self._others:
            if least is not None and number > least:
                break
            if pattern.matches(module):
                return number
        return least


def scale(config: Mapping[str, Any], module: str, rank: int) -> Scale:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA, as the configuration has it for this module.

    Args:
        config: A LoraConfig as a mapping.
        module: The module's dotted path in the base model.
        rank: The rank of its tensors, which is what PEFT divides by when the configuration is true; 0 where they have
            none (LoKr with both factors whole), in which case it divides by the configuration's.
    """
    # LoHa and LoKr call it by its short name.
    usual = config.get("lora_alpha", config.get("alpha"))
    alpha = pattern_value(config.get("alpha_pattern"), module, usual)
    stated = pattern_value(config.get("rank_pattern"), module, config.get("r"))
    if not rank:
        if not isinstance(stated, int) or not stated:
            return Scale(1.0, None, "the configuration states no rank; a scale of 1 is assumed")
        rank = stated
    note = ""
    if isinstance(stated, int) and stated != rank:
        note = f"adapter_config.json says rank {stated} for {module}, its tensors have rank {rank}"
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        return Scale(1.0, None, note or "the configuration states no lora_alpha; a scale of 1 is assumed")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return Scale(as_float(alpha) / divisor, as_float(alpha), note)


def as_float(value: float) -> float:
    """A number of JSON's, where whole ones may be too large: infinite then, which operations refuse by name."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def variant(config: Mapping[str, Any]) -> str:
    """How PEFT's OFT makes rotations of what it stores, as :mod:`loratools.kinds.oft` reads it; empty for its default.

    Source: PEFT ``tuners/oft/config.py``.
    """
    if config.get("peft_type") != "OFT":
        return ""
    words = []
    terms = config.get("num_cayley_neumann_terms", _TERMS)
    if config.get("use_cayley_neumann") is False:
        words.append("cayley")
    elif isinstance(terms, int) and terms != _TERMS:
        words.append(f"neumann={terms}")
    if config.get("coft"):
        eps = config.get("eps")
        words.append(f"coft={eps if isinstance(eps, float) else _EPS}")
    return " ".join(words)


def build(
    modules: Iterable[tuple[str, Module]],
    start: Mapping[str, Any],
    *,
    keep_targets: bool,
    anchored: bool = True,
    keep_training: bool = False,
) -> dict[str, Any]:
    """A configuration that is true for these modules.

    Args:
        modules: Dotted path in the base model, and module.
        start: A configuration to keep the other fields of, or empty.
        keep_targets: Whether ``target_modules`` of ``start`` names exactly these modules.
        anchored: Whether the paths are whole; else they are tails of what the base model may call its modules.
        keep_training: Whether the factors are those of one training, so that how they began is still true.

    Returns:
        A mapping that PEFT's LoraConfig accepts.
    """
    found = list(modules)
    # PEFT matches a pattern against any dotted tail; anchored, it means this module alone.
    start_of_path = "^" if anchored else ""
    ranks = {path: module.rank or 1 for path, module in found}
    alphas = {path: _alpha(module, start) for path, module in found}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    kind = "ADALORA" if any(module.kind == "adalora" for _, module in found) else "LORA"
    if start.get("peft_type", kind) != kind:
        start = {key: start[key] for key in _SHARED if key in start}
    config: dict[str, Any] = {"task_type": None, "bias": "none", **start, "peft_type": kind}
    reset = _TOLD_AGAIN if keep_training else {**_TOLD_AGAIN, **_TRAINING}
    config.update({key: value for key, value in reset.items() if key in start or key == "inference_mode"})
    config.update(
        r=rank,
        lora_alpha=_whole(alpha),
        rank_pattern={
            start_of_path + re.escape(path): value for path, value in sorted(ranks.items()) if value != rank
        },
        alpha_pattern={
            start_of_path + re.escape(path): _whole(value)
            for path, value in sorted(alphas.items())
            if value != alpha
        },
    )
    if kind == "ADALORA":
        # Its patterns are masks of what pruning left, by parameter, and true as long as the tensors are the same.
        config["rank_pattern"] = start.get("rank_pattern")
    parameters = {path for path, module in found if module.kind == "experts"}
    if not keep_targets or not config.get("target_modules"):
        config["target_modules"] = sorted(ranks.keys() - parameters)
    if parameters or config.get("target_parameters"):
        config.update(_of_parameters(parameters, config, keep_targets=keep_targets))
    if any("up_bias" in module.factors for _, module in found):
        config["lora_bias"] = True
    elif "lora_bias" in config:
        config["lora_bias"] = False
    if any(module.magnitude is not None for _, module in found):
        config["use_dora"] = True
    if any(module.in_first and module.op == "linear" for _, module in found):
        config["fan_in_fan_out"] = True
    return config


def _of_parameters(
    parameters: Collection[str], start: Mapping[str, Any], *, keep_targets: bool
) -> dict[str, Any]:
    """The fields that parameters take: their names, and what PEFT's wrapper of parameters refuses."""
    if not parameters:
        return {"target_parameters": None}
    kept = keep_targets and start.get("target_parameters")
    return {
        "target_parameters": start["target_parameters"] if kept else sorted(parameters),
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
    }


def _alpha(module: Module, start: Mapping[str, Any]) -> float:
    """The alpha that makes a module's scale."""
    rank = module.rank or 1
    if module.kind != "adalora":
        return module.scale * rank
    divisor = pruned(module.factors, start, rank)
    # The one that was read makes the very scale; what is computed back may be off by a bit.
    own = module.alpha
    return own if own is not None and own / divisor == module.scale else module.scale * divisor


def pruned(factors: Mapping[str, TensorRef], config: Mapping[str, Any], rank: int) -> float:
    """What AdaLoRA divides alpha by: the rank that training began with, however much of it pruning has left.

    Old releases of PEFT store it as ``ranknum``; others set it from the configuration's ``init_r``, and keep it when
    they cut modules to their pruned rank.

    Args:
        factors: The module's, by role.
        config: An AdaLoraConfig as a mapping.
        rank: Of its tensors, for a configuration that does not say.
    """
    if "ranknum" in factors:
        return factors["ranknum"].scalar() + _PRUNED
    stated = config.get("init_r")
    begun = stated if isinstance(stated, int) and not isinstance(stated, bool) and stated >= rank else rank
    return begun + _PRUNED


def _whole(value: float) -> float | int:
    return int(value) if value.is_integer() else value
