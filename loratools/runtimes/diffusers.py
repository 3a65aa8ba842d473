"""diffusers: LoRA for its pipelines, in its own layout and in those that it converts when it loads them."""

from __future__ import annotations

from loratools.runtimes._base import Runtime

_NO_KEYS = "it stops at keys that it does not know, or passes over them with a warning"

RUNTIME = Runtime(
    name="diffusers",
    title="diffusers",
    layouts=("diffusers", "kohya", "comfy", "ai-toolkit", "musubi", "xlabs", "attn-procs"),
    source="diffusers 0.42 loaders/lora_pipeline.py, loaders/lora_conversion_utils.py and utils/peft_utils.py",
    refuses={
        "mid": _NO_KEYS,
        "bias": _NO_KEYS,
        "whole": _NO_KEYS,
        "tokens": _NO_KEYS,
        "fused_experts": _NO_KEYS,
    },
    ignores={
        "dora_scale": "dora_scale is filtered out with a warning, and plain LoRA is left",
        "mutated_base": "the factors are added to the published base, which is not the one that they were trained on",
    },
    families=frozenset({"image"}),
)
