"""Which modules are tied to which by name, and whether a configuration ties them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from loratools.io.base import Base, Weight

FLAG = "tie_word_embeddings"
# The module of the inputs' embedding, and the head's.
PAIRS: Mapping[str, str] = {
    "model.embed_tokens": "lm_head",
    "model.language_model.embed_tokens": "lm_head",
    "model.text_model.embed_tokens": "lm_head",
    "language_model.model.embed_tokens": "language_model.lm_head",
    "model.decoder.embed_tokens": "lm_head",
    "model.shared": "lm_head",
    "shared": "lm_head",
    "transformer.wte": "lm_head",
    "transformer.word_embeddings": "lm_head",
    "backbone.embeddings": "lm_head",
    "bert.embeddings.word_embeddings": "cls.predictions.decoder",
    "roberta.embeddings.word_embeddings": "lm_head.decoder",
}
# Model types whose head has another name.
HEADS: Mapping[str, str] = {"whisper": "proj_out", "moonshine": "proj_out"}
# A head whose bias is tied too, by the same switch, and what that bias is called where it is stored.
BIASES: Mapping[str, str] = {
    "cls.predictions.decoder": "cls.predictions.bias",
    "lm_head.decoder": "lm_head.bias",
}
# Model types that compute something else where the switch is off, or use the embedding a third time.
INSEPARABLE = (
    *("bart", "longt5", "m2m_100", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "plbart"),
    *("switch_transformers", "t5", "umt5"),
)
# What holds where the configuration does not say: transformers leaves out what is a type's own default.
TIED = (
    *("bert", "bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2"),
    *("gpt_bigcode", "gpt_neo", "mpt", "opt", "roberta", "starcoder2", "t5", "whisper", "xlm-roberta"),
)
UNTIED = (
    *("deepseek_v2", "deepseek_v3", "gpt_neox", "gpt_oss", "gptj", "llama", "mistral", "mixtral", "olmo"),
    *("olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "stablelm"),
)
# Ends of class names with a head that is the embedding; bare networks and classifiers have none.
_HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


class Pair(NamedTuple):
    """An embedding that a base stores, and the head it has no tensor for.

    Attributes:
        part: The subfolder of a diffusers model, or empty.
        weight: The embedding.
        head: The head's module.
    """

    part: str
    weight: Weight
    head: str

    @property
    def key(self) -> str:
        """The tensor that the head would have."""
        return f"{self.head}.weight"


def pairs(base: Base) -> Iterator[Pair]:
    for part, weights in base.parts.items():
        config = base.configs.get(part, {})
        for embedding, usual in PAIRS.items():
            head = HEADS.get(type_of(config), usual)
            # The first releases were saved without the network's own name, and are loaded with a head all the same.
            bare = embedding.partition(".")[2] if _is_headed(config) else ""
            for name in (embedding, "" if bare in PAIRS else bare):
                weight = weights.get(f"{name}.weight")
                if weight is not None and f"{head}.weight" not in weights:
                    yield Pair(part, weight, head)


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration ties the head to the embedding; None where it does not tell."""
    if _is_headed(config) is False:
        return False
    text = config.get("text_config")
    for said in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(said.get(FLAG), bool):
            return bool(said[FLAG])
        if type_of(said) in TIED or type_of(said) in UNTIED:
            return type_of(said) in TIED
    return None


def type_of(config: Mapping[str, Any]) -> str:
    """The model type that a configuration names, or empty."""
    return str(config.get("model_type", ""))


def _is_headed(config: Mapping[str, Any]) -> bool | None:
    """Whether the model's class has a head; None where the configuration names no class."""
    classes = config.get("architectures")
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not classes:
        return None
    return any(str(name).endswith(_HEADED) for name in classes)
