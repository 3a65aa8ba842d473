"""vLLM: PEFT folders of language models, packed into its own fused layers."""

from __future__ import annotations

from loratools.runtimes._base import Runtime

_ONE_RANK = "one rank and one alpha, those of the configuration, are taken for all modules"

RUNTIME = Runtime(
    name="vllm",
    title="vLLM",
    layouts=("peft",),
    source="vLLM vllm/lora/peft_helper.py, vllm/lora/lora_model.py and vllm/config/lora.py",
    refuses={
        "dora": "it stops: DoRA is not supported",
        "bias": "it stops: unsupported LoRA weight",
        "lora_bias": "it stops: adapter bias is not supported",
        "whole": "it stops: modules_to_save is not supported",
        "tokens": "it stops: unsupported LoRA weight",
        "conv": "it stops: the target module is not supported",
        "default_name": "it stops: unsupported LoRA weight",
        "alora": "it stops: unsupported configuration",
    },
    ignores={
        "scales": _ONE_RANK,
        "mutated_base": "the factors are added to the published base, which is not the one that they were trained on",
        "layer_replication": "the layers have other numbers in the base",
        "variant": "the configuration's field is passed over, and the factors are multiplied as plain ones",
        "wrapped": "names that are not the model's are passed over, or refused as unexpected modules",
    },
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    usual_rank=16,
    families=frozenset({"language", "speech"}),
    option="--max-lora-rank {}",
    configured=True,
    normal=True,
)
