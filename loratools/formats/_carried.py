"""What goes with the modules into another layout: metadata, training configurations, embedded tokens.

A PEFT configuration says more than the scale: dropout, task, the base model's name. Where a layout has no slot for
that, it lies in the header under a key of our own, as JSON by component, and is the start of the next configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from loratools.errors import MalformedFileError
from loratools.io import json_text
from loratools.model import Adapter
from loratools.tensors import TensorRef

CONFIGS = "loratools.adapter_config"
"""Our key for what configurations say beside the modules."""

DIFFUSERS_HEADER = "lora_adapter_metadata"
"""diffusers' key for a LoraConfig per component."""

# The record that a merge leaves.
_MERGE = "loratools.merge"

# Hashes of the file that was read, and what only the header of a GGUF file says.
_STALE = (
    "modelspec.hash_sha256",
    CONFIGS,
    DIFFUSERS_HEADER,
    *("general.type", "adapter.type", "adapter.lora.alpha"),
)
_HASHES = "sshs_"

OF_THE_MODULES = frozenset(
    (
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters"),
        *("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "inference_mode"),
        *("exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "trainable_token_indices", "bias"),
    )
)
"""What of a configuration is told by the modules that are written, or announces tensors of no module."""

# What a configuration says of any adapter, made without one to start from.
_OF_ANY = {"task_type": None, "peft_type": "LORA"}

EMBEDDED = "<embed>"
"""What cloneofsimo's header says of a token that is stored beside the modules."""

BUNDLE = "bundle_emb."
"""What Kohya's readers want before an embedding's name."""

PACKED = ".string_to_param.*"
"""And after it."""


def metadata(adapter: Adapter, *, configs_apart: bool = False) -> dict[str, str]:
    """The adapter's metadata without what is only true of the file it came from.

    Args:
        adapter: From any layout.
        configs_apart: Whether the layout has a place of its own for configurations.
    """
    from loratools.formats import _kohya_metadata

    kept = {
        key: value
        for key, value in adapter.metadata.items()
        if key not in _STALE and not key.startswith(_HASHES)
    }
    if adapter.layout.name == "cloneofsimo":
        from loratools.formats import cloneofsimo

        kept = cloneofsimo.without_marks(kept)
    _kohya_metadata.correct(adapter, kept)
    said = {} if configs_apart else _remembered(adapter)
    if said:
        kept[CONFIGS] = json.dumps(said, sort_keys=True)
    return kept


def _remembered(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """What is kept of the configurations: what the modules will not tell again."""
    kept = {
        component: {key: value for key, value in config.items() if key not in OF_THE_MODULES}
        for component, config in configs(adapter).items()
    }
    return {
        component: config
        for component, config in kept.items()
        if any(key not in _OF_ANY or value != _OF_ANY[key] for key, value in config.items())
    }


def configs(adapter: Adapter) -> dict[str, Mapping[str, Any]]:
    """Configurations by component: the layout's own, else those that another layout passed on.

    Raises:
        MalformedFileError: What the header holds is not JSON, or not by component.
    """
    if "peft_type" in adapter.config:
        return dict.fromkeys(adapter.components(), adapter.config)
    if adapter.layout.name == "diffusers" and adapter.metadata.get(DIFFUSERS_HEADER):
        from loratools.formats import diffusers

        return diffusers.configs_of(adapter)
    found = parsed(adapter.metadata.get(CONFIGS, ""))
    if adapter.layout.name == "gguf":
        from loratools.formats import gguf

        return {name: {**found.get(name, {}), **gguf.said(adapter)} for name in adapter.components()}
    return dict(found)


@lru_cache(maxsize=8)
def parsed(text: str) -> Mapping[str, Mapping[str, Any]]:
    """Configurations by component, as the header has them under our key.

    Raises:
        MalformedFileError: The text is not JSON, or not by component.
    """
    if not text:
        return {}
    try:
        found = json_text.loads(text)
    except ValueError as error:
        raise MalformedFileError(f"the header's {CONFIGS} is not JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(config, dict) for config in found.values()):
        raise MalformedFileError(
            f"the header's {CONFIGS} is {text[:40]!r}",
            expected="An object of configurations by component was expected",
        )
    return found


def is_merged(adapter: Adapter) -> bool:
    """Whether several adapters were merged into it, so that how it was trained is no longer one configuration."""
    return _MERGE in adapter.metadata


def token(ref: TensorRef, adapter: Adapter) -> TensorRef | None:
    """A packed textual inversion as Kohya's readers find it; None for any other tensor of no module.

    cloneofsimo's trainer stores a token's vector (dim,) under the token, which the header marks; A1111 and ComfyUI
    read ``bundle_emb.<name>.string_to_param.*`` of (tokens, dim).
    """
    if ref.name.startswith(BUNDLE):
        return ref
    # A dot would end the name in the key.
    named = adapter.metadata.get(ref.name) == EMBEDDED and "." not in ref.name
    if named and len(ref.shape) == 1:
        return ref.reshaped((1, *ref.shape)).renamed(BUNDLE + ref.name + PACKED)
    return None
