"""SGLang: PEFT folders of language models, q with k and v, and gate with up, in one buffer each."""

from __future__ import annotations

from loratools.runtimes._base import Pair, Runtime

_ONE_SCALE = "alpha / r of the configuration is taken for all modules"

RUNTIME = Runtime(
    name="sglang",
    title="SGLang",
    layouts=("peft",),
    source="SGLang 0.5.23 python/sglang/srt/lora/lora.py, lora_config.py and lora_manager.py",
    refuses={
        "dora": "it stops: DoRA is not supported",
        "tokens": "it stops: adapters that add tokens are not supported",
        "regex_targets": "it stops: target_modules has to be a list, or all-linear",
        "alora": "it stops: unsupported configuration",
    },
    ignores={
        "ranks": "the configuration's r says where each module's factors end, whatever rank they have",
        "scales": _ONE_SCALE,
        "rslora": _ONE_SCALE,
        "bias": "weights that are no factors are passed over",
        "lora_bias": "weights that are no factors are passed over",
        "whole": "weights that are no factors are passed over",
        "conv": "it has no such layer",
        "mutated_base": "the factors are added to the published base, which is not the one that they were trained on",
        "layer_replication": "the layers have other numbers in the base",
        "variant": "the configuration's field is passed over, and the factors are multiplied as plain ones",
        "wrapped": "names that are not the model's are passed over",
        "default_name": "names that are not the model's are passed over",
    },
    pairs=(Pair("q_proj", "v_proj"), Pair("gate_proj", "up_proj")),
    families=frozenset({"language"}),
    option="--max-lora-rank {}",
    configured=True,
    normal=True,
)
