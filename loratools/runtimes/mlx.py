"""mlx-lm: its own folders, one rank and one scale for all modules of the last layers."""

from __future__ import annotations

from loratools.runtimes._base import Runtime

_NO_PARAMETER = "it stops: not an adapter parameter in the model"

RUNTIME = Runtime(
    name="mlx",
    title="MLX (mlx-lm)",
    layouts=("mlx",),
    source="mlx-lm 0.32 mlx_lm/tuner/utils.py and mlx_lm/tuner/lora.py",
    kinds=frozenset({"lora", "experts"}),
    refuses={
        "ranks": "it stops: the adapter's shape does not match the model parameter's",
        "bias": _NO_PARAMETER,
        "lora_bias": _NO_PARAMETER,
        "whole": _NO_PARAMETER,
        "tokens": _NO_PARAMETER,
        "conv": "it stops: such a layer cannot be converted to LoRA",
        "split_experts": "it stops: its experts are one stacked layer",
    },
    ignores={
        "scales": "it has one scale for all modules",
        "mutated_base": "the factors are added to the published base, which is not the one that they were trained on",
        "layer_replication": "the layers have other numbers in the base",
        "alora": "the factors act on every token, not on those behind the invocation",
        "variant": "the factors are multiplied as plain ones",
    },
    families=frozenset({"language"}),
    configured=True,
    normal=True,
    containers=("safetensors",),
)
