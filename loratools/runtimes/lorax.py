"""LoRAX, and the engine of Text Generation Inference that came of it: PEFT folders, one stack of layers per target."""

from __future__ import annotations

from loratools.runtimes._base import Runtime

_NAMED = (
    "only base_model.model.<module>.lora_A.weight and lora_B.weight are looked up; the others are passed over"
)

RUNTIME = Runtime(
    name="lorax",
    title="LoRAX (and TGI)",
    layouts=("peft",),
    source="LoRAX server/lorax_server/adapters/lora.py",
    refuses={
        "layer_ranks": "it stops: the factors of a target's layers are stacked, and have to be of one rank",
    },
    ignores={
        "scales": "one factor, alpha / r or alpha / sqrt(r) of the configuration, is taken for all modules",
        "dora": _NAMED,
        "bias": _NAMED,
        "lora_bias": _NAMED,
        "whole": _NAMED,
        "embedding": _NAMED,
        "tokens": _NAMED,
        "conv": "it has no such layer",
        "fused_experts": _NAMED,
        "split_experts": _NAMED,
        "wrapped": _NAMED,
        "default_name": _NAMED,
        "mutated_base": "the factors are added to the published base, which is not the one that they were trained on",
        "layer_replication": "the layers have other numbers in the base",
        "alora": "the factors act on every token, not on those behind the invocation",
        "variant": "the configuration's field is passed over, and the factors are multiplied as plain ones",
    },
    families=frozenset({"language"}),
    every_layer=True,
    configured=True,
    normal=True,
)
