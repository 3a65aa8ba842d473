"""What an adapter uses of what some programs do not know: by feature, with the keys that show it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from loratools.errors import UnsupportedKindError
from loratools.formats._peft_config import as_float
from loratools.formats._peft_special import refuse_changed_base
from loratools.model import Module
from loratools.ops import _doctor_odd
from loratools.ops._doctor_case import Case

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(r"(^|\.)experts?\.\d+\.")
# The most axes that factors of matrices have: those of experts are stacked.
_MATRICES = 3
_VARIANTS = ("kasa_config", "use_qalora", "use_bdlora", "arrow_config")


class Used(NamedTuple):
    """That an adapter uses a feature.

    Attributes:
        keys: The modules, tensors or fields that show it.
        word: What they are, in the singular.
        of: How many of these there are in all; 0 where that says nothing.
        stated: Whether the configuration alone says so, and no tensor does.
    """

    keys: tuple[str, ...]
    word: str = "module"
    of: int = 0
    stated: bool = False


def used(case: Case) -> dict[str, Used]:
    """All features that an adapter uses, by their names in :data:`loratools.runtimes.FEATURES`."""
    found = {**_of_modules(case), **_of_fields(case), **_of_both(case)}
    return {feature: each for feature, each in found.items() if each.keys}


def _of_modules(case: Case) -> dict[str, Used]:
    """Features that modules show."""
    tests: Mapping[str, Callable[[Module], bool]] = {
        "lora_bias": lambda module: "up_bias" in module.factors,
        "embedding": lambda module: module.op == "embedding",
        "conv": _is_conv,
        "mid": lambda module: "mid" in module.factors,
        "fused_experts": lambda module: module.kind == "experts",
        "split_experts": lambda module: bool(_EXPERT.search(module.target.path)),
        "dora": lambda module: module.magnitude is not None,
        "dora_scale": lambda module: _magnitude(module).endswith("dora_scale"),
        "dora_vector": lambda module: (
            bool(_magnitude(module)) and not _magnitude(module).endswith("dora_scale")
        ),
        "header_scale": lambda module: case.layout == "diffusers" and module.scale != 1.0,
    }
    found = {feature: _those(case.modules, test) for feature, test in tests.items()}
    found["ranks"], found["layer_ranks"] = _ranks(case)
    found["scales"] = _scales(case)
    return found


def _is_conv(module: Module) -> bool:
    """Whether its weight is a convolution's; kinds that only scale have no factors that would make it one."""
    return module.op == "conv" or any(len(ref.shape) > _MATRICES for ref in module.factors.values())


def _those(modules: Iterable[Module], test: Callable[[Module], bool]) -> Used:
    known = list(modules)
    return Used(tuple([str(module.target) for module in known if test(module)]), of=len(known))


def _magnitude(module: Module) -> str:
    return module.magnitude.name if module.magnitude is not None else ""


def _ranks(case: Case) -> tuple[Used, Used]:
    """Modules of another rank than most, in all and among the layers of one target."""
    ranked = [module for module in case.modules if module.rank]
    by_target: dict[str, list[Module]] = {}
    for module in ranked:
        by_target.setdefault(_NUMBER.sub("#", module.target.path), []).append(module)
    among = [module for members in by_target.values() for module in _off(members)]
    return _ranked(_off(ranked), len(ranked)), _ranked(among, len(ranked))


def _ranked(off: list[Module], of: int) -> Used:
    return Used(tuple([f"{module.target}: {module.rank}" for module in off]), of=of)


def _off(modules: list[Module]) -> list[Module]:
    """Those that do not have the commonest rank."""
    counts = [module.rank for module in modules]
    most = max(counts, key=counts.count, default=None)
    return [module for module in modules if module.rank != most]


def _scales(case: Case) -> Used:
    """Modules of another scale than the one that a program without patterns takes for all."""
    scaled = [module for module in case.modules if module.rank]
    one = _one_scale(case, scaled)
    off = [module for module in scaled if not math.isclose(module.scale, one, rel_tol=1e-6)]
    return Used(tuple([f"{module.target}: {module.scale:g}, not {one:g}" for module in off]), of=len(scaled))


def _one_scale(case: Case, modules: list[Module]) -> float:
    """alpha / r or alpha / sqrt(r) of the configuration; without one, the commonest scale."""
    alpha, rank = case.config.get("lora_alpha"), case.config.get("r")
    if isinstance(alpha, int | float) and isinstance(rank, int) and rank > 0:
        return as_float(alpha) / (math.sqrt(rank) if case.config.get("use_rslora") else rank)
    scales = [module.scale for module in modules]
    return max(scales, key=scales.count, default=1.0)


def _of_fields(case: Case) -> dict[str, Used]:
    """Features that the configuration alone shows."""
    config = case.config
    targets = config.get("target_modules")
    tests = {
        "rslora": ("use_rslora", bool(config.get("use_rslora")) and any(m.rank != 1 for m in case.modules)),
        "regex_targets": ("target_modules", isinstance(targets, str) and targets != "all-linear"),
        "mutated_base": ("init_lora_weights", _is_mutated(case)),
        "layer_replication": ("layer_replication", bool(config.get("layer_replication"))),
        "alora": ("alora_invocation_tokens", bool(config.get("alora_invocation_tokens"))),
    }
    found = {feature: Used((field,) if there else (), "field") for feature, (field, there) in tests.items()}
    found["variant"] = Used(tuple(field for field in _VARIANTS if config.get(field)), "field")
    return found


def _is_mutated(case: Case) -> bool:
    """Whether the initialisation has changed the base."""
    if case.adapter is None or case.config.get("layer_replication"):
        return False
    try:
        refuse_changed_base(case.adapter)
    except UnsupportedKindError:
        return True
    return False


def _of_both(case: Case) -> dict[str, Used]:
    """Features that the configuration announces and tensors hold."""
    config, extras = case.config, case.extras
    tokens = [key for key in extras if "trainable_tokens" in key or "token_adapter" in key]
    # A full copy of a module may have a bias as well.
    saved = config.get("modules_to_save") if isinstance(config.get("modules_to_save"), list) else []
    whole = [key for key in extras if any(f".{name}." in f".{key}" for name in saved or ())]
    whole += [str(module.target) for module in case.modules if module.kind == "full" and case.by_peft]
    biases = [key for key in extras if key.endswith(".bias") and key not in whole]
    announced = config.get("bias") not in (None, "none")
    return {
        "tokens": _announced(tokens, bool(config.get("trainable_token_indices")), "trainable_token_indices"),
        "whole": _announced(whole, bool(saved), "modules_to_save"),
        "bias": _announced(biases, announced, "bias"),
        "wrapped": Used(_doctor_odd.odd(case), "key", len(case.tensors)),
        "default_name": Used(_doctor_odd.named_default(case), "key", len(case.tensors)),
    }


def _announced(keys: list[str], stated: bool, field: str) -> Used:
    return Used(tuple(keys), "tensor") if keys or not stated else Used((field,), "field", stated=True)
