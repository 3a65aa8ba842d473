"""ComfyUI: any spelling of a module's name that a model's key map has; what it does not know is logged and left out."""

from __future__ import annotations

from loratools.runtimes._base import Runtime

_NOT_LOADED = "the log says 'lora key not loaded', and the rest is applied without it"

RUNTIME = Runtime(
    name="comfyui",
    title="ComfyUI",
    layouts=("comfy", "kohya", "lycoris", "onetrainer", "diffusers", "ai-toolkit", "musubi", "attn-procs"),
    source="ComfyUI comfy/lora.py and comfy/weight_adapter/",
    kinds=frozenset({"lora", "loha", "lokr", "oft", "glora", "full"}),
    ignores={
        "dora_vector": _NOT_LOADED,
        "header_scale": "the header is not read: a scale of 1 is taken",
        "lora_bias": _NOT_LOADED,
        "bias": _NOT_LOADED,
        "tokens": _NOT_LOADED,
        "whole": _NOT_LOADED,
        "fused_experts": _NOT_LOADED,
        "mutated_base": "the factors are added to the published base, which is not the one that they were trained on",
    },
    families=frozenset({"image"}),
)
