"""llama.cpp: adapters in GGUF, one alpha for all tensors, divided by the rank of each."""

from __future__ import annotations

from loratools.runtimes._base import Runtime

_ONE_ALPHA = "it has one alpha for all modules, which it divides by each one's rank"
_NO_PLACE = "its files have no place for it: its converter stops at the tensor"

RUNTIME = Runtime(
    name="llama.cpp",
    title="llama.cpp",
    layouts=("gguf",),
    source="llama.cpp convert_lora_to_gguf.py and src/llama-adapter.cpp",
    kinds=frozenset({"lora", "experts"}),
    refuses={
        "dora": _NO_PLACE,
        "bias": _NO_PLACE,
        "lora_bias": _NO_PLACE,
        "whole": _NO_PLACE,
        "tokens": _NO_PLACE,
        "conv": _NO_PLACE,
    },
    ignores={
        "scales": _ONE_ALPHA,
        "rslora": _ONE_ALPHA,
        "mutated_base": "the factors are added to the published base, which is not the one that they were trained on",
        "layer_replication": "the layers have other numbers in the base",
        "variant": "the factors are multiplied as plain ones",
    },
    families=frozenset({"language"}),
    normal=True,
    by_base=True,
)
