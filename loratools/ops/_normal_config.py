"""PEFT's configuration with only the fields that programs which serve adapters read, in the forms that they take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# What says nothing of how the factors are to be applied, and is true as it was.
_KEPT = ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_type", "lora_dropout")
# Features that a normal form does not use; programs look at these fields.
_OFF: Mapping[str, Any] = {
    "bias": "none",
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
    "inference_mode": True,
}
_TRUE = ("r", "lora_alpha", "fan_in_fan_out", "target_parameters")


def plain(config: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """A configuration that every program reads alike.

    Args:
        config: A true one of PEFT's for the modules, without patterns.
        paths: The modules' dotted paths.

    Returns:
        It, with ``target_modules`` as a list of the last words of the paths.
    """
    kept = {key: config[key] for key in (*_KEPT, *_TRUE) if config.get(key) is not None}
    names = sorted({path.rpartition(".")[2] for path in paths})
    return dict(sorted({**kept, **_OFF, "target_modules": names}.items()))
