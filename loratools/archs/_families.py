"""Families of language, speech and vision models: what people call the model that an adapter is of.

All of a kind share the architecture's names here (see ``llm``, ``speech`` and ``vision``), so that nothing computed
depends on a family; it is told as far as a configuration or the names say it.
Sources: the module names and classes of transformers 5.23; the base models' names as their makers publish them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple


class Family(NamedTuple):
    """One family.

    Attributes:
        title: As people call it.
        classes: Beginnings of transformers' class names.
        words: Words of base models' names that mean it; digits may follow.
        markers: Parts of paths, with "#" for numbers, that only its models have.
        absent: Parts of paths that its models do not have, where others share its markers.
    """

    title: str
    classes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


# A family stands before those that its names or words are a part of.
FAMILIES: tuple[Family, ...] = (
    Family("Whisper", ("Whisper",), ("whisper",), ("model.encoder.conv1", "model.encoder.conv2")),
    Family("MMS (wav2vec 2.0)", (), ("mms",)),
    Family(
        "wav2vec 2.0",
        ("Wav2Vec2",),
        ("wav2vec2", "xlsr", "wav2vec"),
        ("wav2vec2.encoder", "wav2vec2.feature"),
    ),
    Family("HuBERT", ("Hubert",), ("hubert",), ("hubert.encoder",)),
    Family("WavLM", ("WavLM",), ("wavlm",), ("wavlm.encoder",)),
    Family("CLIP", ("CLIP",), ("clip",), ("visual_projection", "text_projection")),
    Family("ViT", ("ViT",), ("vit",), ("vit.encoder", "vit.layers")),
    Family("DeiT", ("DeiT",), ("deit",), ("deit.encoder",)),
    Family("BEiT", ("Beit",), ("beit",), ("beit.encoder",)),
    Family("DINOv2", ("Dinov2",), ("dinov2",), ("dinov2.encoder",)),
    Family("Swin", ("Swin",), ("swin",), ("swin.encoder",)),
    Family("SegFormer", ("Segformer",), ("segformer",), ("segformer.encoder",)),
    Family("SigLIP", ("Siglip",), ("siglip",)),
    Family("XLM-RoBERTa", ("XLMRoberta",), ("xlm-roberta", "xlmr")),
    Family(
        "DistilBERT", ("DistilBert",), ("distilbert",), ("distilbert.transformer", "distilbert.embeddings")
    ),
    Family("RoBERTa", ("Roberta",), ("roberta", "distilroberta"), ("roberta.encoder", "roberta.embeddings")),
    Family("DeBERTa", ("Deberta",), ("deberta",), ("deberta.encoder", "deberta.embeddings")),
    Family("BERT", ("Bert",), ("bert",), ("bert.encoder", "bert.embeddings", "bert.pooler")),
    Family(
        "T5",
        ("T5", "MT5", "UMT5"),
        ("t5", "mt5", "umt5", "byt5", "flan"),
        ("layer.#.SelfAttention", "block.#.layer"),
    ),
    Family("GPT-NeoX", ("GPTNeoX",), ("gpt-neox", "pythia"), ("gpt_neox.layers",)),
    Family("GPT-Neo", ("GPTNeoFor", "GPTNeoModel"), ("gpt-neo",), ("h.#.attn.attention",)),
    Family("GPT-J", ("GPTJ",), ("gpt-j",)),
    Family(
        "GPT-2", ("GPT2",), ("gpt2", "distilgpt2"), ("h.#.attn.c_attn", "h.#.attn.c_proj", "h.#.mlp.c_fc")
    ),
    Family("BLOOM", ("Bloom",), ("bloom", "bloomz")),
    Family("Falcon", ("Falcon",), ("falcon",)),
    Family("ESM", ("Esm",), ("esm",), ("esm.encoder", "esm.embeddings")),
    Family("MPT", ("Mpt",), ("mpt",), ("transformer.blocks.#.attn.Wqkv", "transformer.blocks.#.ffn")),
    Family(
        "ChatGLM",
        ("ChatGLM",),
        ("chatglm", "chatglm2", "chatglm3"),
        ("transformer.encoder.layers.#.self_attention",),
    ),
    Family(
        "OPT",
        ("OPT",),
        ("opt",),
        ("model.decoder.layers.#.fc", "model.decoder.layers.#.self_attn"),
        (
            "model.encoder",
            "encoder_attn",
        ),
    ),
    Family("Mixtral", ("Mixtral",), ("mixtral",), ("block_sparse_moe",)),
    Family("Mistral", ("Mistral",), ("mistral", "ministral", "zephyr")),
    Family("Qwen", ("Qwen",), ("qwen",)),
    Family("Gemma", ("Gemma",), ("gemma",)),
    Family("Phi", ("Phi",), ("phi",)),
    Family("DeepSeek", ("Deepseek",), ("deepseek",)),
    Family("Llama", ("Llama",), ("llama", "tinyllama", "codellama", "vicuna", "alpaca")),
)

# Architectures that have families: the others are one each.
_OF_MANY = ("llm", "speech", "vision", "unknown")


def family(arch: str, config: Mapping[str, Any], paths: Iterable[str]) -> str:
    """What people call the model that an adapter is of.

    The class that PEFT noted goes before the base model's name, which goes before the names of the modules: those are
    shared by many, and where they are not, a name that says otherwise is some folder's.

    Args:
        arch: The architecture's name.
        config: adapter_config.json, or empty.
        paths: The modules' dotted paths.

    Returns:
        The family's title; empty where nothing tells.
    """
    if arch not in _OF_MANY:
        return ""
    mapping = config.get("auto_mapping")
    stated = str(mapping.get("base_model_class") or "") if isinstance(mapping, Mapping) else ""
    by_class = next(
        (each for each in FAMILIES if stated and stated.startswith(each.classes or ("\0",))), None
    )
    by_word = _by_word(str(config.get("base_model_name_or_path") or config.get("model") or ""))
    by_names = _by_names(frozenset(re.sub(r"(?<![^.])\d+(?![^.])", "#", path) for path in paths))
    if by_class is not None:
        # MMS has wav2vec 2.0's classes and names.
        return by_word.title if by_word is not None and not by_word.classes else by_class.title
    # A family that only lacks what others have is a guess.
    certain = by_names is not None and not by_names.absent
    if by_word is not None and (not certain or not by_word.markers or by_word is by_names):
        return by_word.title
    return by_names.title if by_names is not None else ""


def _by_word(base: str) -> Family | None:
    """The family that a base model's name says: its own name first, then its owner's on a hub (``owner/name``)."""
    parts = base.lower().replace("_", "-").replace("\\", "/").rstrip("/").split("/")
    for part in reversed(parts if len(parts) == 2 else parts[-1:]):
        for each in FAMILIES:
            if any(_has_word(part, word) for word in each.words):
                return each
    return None


@lru_cache(maxsize=256)
def _word(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z]){re.escape(word)}(?![a-z])")


def _has_word(name: str, word: str) -> bool:
    return _word(word).search(name) is not None


def _by_names(skeletons: frozenset[str]) -> Family | None:
    """The family whose markers the modules' names have, with "#" for whole numbers."""
    text = "\n".join(f".{name}." for name in skeletons)
    for each in FAMILIES:
        held = any(f".{marker}" in text for marker in each.markers)
        if held and not any(f".{marker}" in text for marker in each.absent):
            return each
    return None
