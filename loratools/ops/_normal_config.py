"""PEFT's configuration with only the fields that programs which serve adapters read, in the forms that they take.

What an input's configuration says beyond them is named, so that nothing goes unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratools.formats import Document, Format, _carried
from loratools.model import Adapter
from loratools.ops._doctor_fields import LORA_FIELDS

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
# What PEFT writes for fields that nobody has set, where that is not nothing. Source: PEFT 0.21.2 LoraConfig.
_DEFAULTS: Mapping[str, Any] = {
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
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


def lost(adapter: Adapter, document: Document, form: Format) -> list[str]:
    """A note on what a LoraConfig says and the output does not; what PEFT writes of itself, unset, says nothing.

    Configurations of PEFT's other methods are of modules that have become LoRA, which is told by itself.

    Args:
        adapter: The input.
        document: What is written of it.
        form: The layout.
    """
    config = adapter.config
    if config.get("peft_type") != "LORA":
        return []
    whole = document.config if form.fields is None else {}
    if whole is None:
        return []
    placed = {*whole, *(form.fields or ()), *_KEPT, "peft_version", *_carried.OF_THE_MODULES}
    names = sorted(key for key, value in config.items() if key not in placed and not _is_unset(key, value))
    if not names:
        return []
    verb = "field of adapter_config.json has" if len(names) == 1 else "fields of adapter_config.json have"
    kept = "; the header keeps what it says" if _carried.CONFIGS in document.metadata else ""
    return [f"{len(names)} {verb} no place there: {', '.join(names)}{kept}"]


def _is_unset(field: str, value: Any) -> bool:
    return field in LORA_FIELDS and (not value or value == _DEFAULTS.get(field))
