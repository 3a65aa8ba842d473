"""AUTOMATIC1111's web UI, and Forge: Kohya's names of Stable Diffusion's layers; others are left out in silence."""

from __future__ import annotations

from loratools.runtimes._base import Runtime

_UNMATCHED = "keys that match no layer are left out; only the debug log names them"

RUNTIME = Runtime(
    name="a1111",
    title="AUTOMATIC1111 and Forge",
    layouts=("kohya", "lycoris", "onetrainer"),
    source="stable-diffusion-webui extensions-builtin/Lora/networks.py and network.py",
    kinds=frozenset({"lora", "loha", "lokr", "oft", "glora", "ia3", "full"}),
    ignores={
        "dora_vector": _UNMATCHED,
        "header_scale": "the header is not read: a scale of 1 is taken",
        "lora_bias": _UNMATCHED,
        "bias": _UNMATCHED,
        "tokens": _UNMATCHED,
        "whole": _UNMATCHED,
        "fused_experts": _UNMATCHED,
        "mutated_base": "the factors are added to the published base, which is not the one that they were trained on",
    },
    families=frozenset({"image"}),
)
