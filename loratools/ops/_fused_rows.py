"""Rows of fused weights, family by family: which rows of a ``query_key_value`` are q's, of a ``gate_up_proj`` up's.

Families lay q, k and v out in three ways: one whole after the other; for each head its q, k and v (GPT-NeoX, BLOOM); or
for each key head the queries that share it, then k and v (Falcon's later releases). CodeGen parts its heads in four and
puts v before k. Source: the attention and MLP classes of transformers 5.23, by ``model_type``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import gcd
from typing import Any, NamedTuple

from loratools.model import Rows

Config = Mapping[str, Any]
Parts = tuple[Rows, ...]

# The names of the parts of attention's fused weight, and of an MLP's.
ATTENTION = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
GATES = (("gate_proj", "up_proj"),)


class Fused(NamedTuple):
    """A fused weight's name, and where its parts lie.

    Attributes:
        leaf: Its last word.
        parts: What its parts are called where they are apart, one choice of names after the other.
        rows: The rows of each part, by a model's configuration; None where that does not say.
    """

    leaf: str
    parts: Sequence[tuple[str, ...]]
    rows: Callable[[Config], Parts | None]


def in_turn(*heights: int) -> Parts:
    """Parts of these heights, a count of rows or shares each, one whole after the other."""
    unit = gcd(*heights)
    shares = [height // unit for height in heights]
    starts = [sum(shares[:number]) for number in range(len(shares))]
    return tuple(
        Rows(((start, start + share),), sum(shares)) for start, share in zip(starts, shares, strict=True)
    )


def _groups(count: int, sizes: Sequence[int], order: Sequence[int]) -> Parts:
    """Parts in ``count`` groups of shares; ``order`` says whose ``sizes`` come one after the other in a group."""
    step = sum(sizes[part] for part in order)
    offsets = {part: sum(sizes[other] for other in order[:place]) for place, part in enumerate(order)}
    return tuple(
        Rows(
            tuple(
                (group * step + offsets[part], group * step + offsets[part] + size) for group in range(count)
            ),
            count * step,
        )
        for part, size in enumerate(sizes)
    )


def _number(config: Config, *names: str) -> int | None:
    """The first of these fields that is a positive number."""
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _heads(config: Config) -> int | None:
    return _number(config, "num_attention_heads", "n_head", "n_heads")


def _each_head(config: Config) -> Parts | None:
    heads = _heads(config)
    return None if heads is None else _groups(heads, (1, 1, 1), (0, 1, 2))


def _wholes(config: Config) -> Parts | None:
    """q of all heads, then k and v of the key heads."""
    said = config.get("attn_config")
    more = said if isinstance(said, Mapping) else {}
    heads = _heads(config)
    keys = _number({**more, **config}, "num_key_value_heads", "kv_n_heads") or heads
    return None if heads is None or keys is None else in_turn(heads, keys, keys)


def _thirds(config: Config) -> Parts:  # noqa: ARG001 - whatever the configuration
    return in_turn(1, 1, 1)


def _halves(config: Config) -> Parts:  # noqa: ARG001 - whatever the configuration
    return in_turn(1, 1)


def _falcon(config: Config) -> Parts | None:
    heads = _heads(config)
    if heads is None:
        return None
    if config.get("new_decoder_architecture"):
        keys = _number(config, "num_kv_heads", "n_head_kv") or heads
        return None if heads % keys else _groups(keys, (heads // keys, 1, 1), (0, 1, 2))
    return in_turn(heads, 1, 1) if config.get("multi_query", True) else _each_head(config)


def _bigcode(config: Config) -> Parts | None:
    heads = _heads(config)
    if heads is None or not config.get("multi_query", True):
        return _each_head(config)
    return in_turn(heads, 1, 1)


def _codegen(config: Config) -> Parts | None:
    heads = _heads(config)
    return None if heads is None or heads % 4 else _groups(4, (1, 1, 1), (0, 2, 1))


_GATE_UP = Fused("gate_up_proj", GATES, _halves)
# What model types fuse, and how.
FAMILIES: Mapping[str, tuple[Fused, ...]] = {
    "phi3": (Fused("qkv_proj", ATTENTION, _wholes), _GATE_UP),
    "glm": (_GATE_UP,),
    "glm4": (_GATE_UP,),
    "gpt2": (Fused("c_attn", ATTENTION, _thirds),),
    "openai-gpt": (Fused("c_attn", ATTENTION, _thirds),),
    "gpt_bigcode": (Fused("c_attn", ATTENTION, _bigcode),),
    "gpt_neox": (Fused("query_key_value", ATTENTION, _each_head),),
    "persimmon": (Fused("query_key_value", ATTENTION, _each_head),),
    "bloom": (Fused("query_key_value", ATTENTION, _each_head),),
    "falcon": (Fused("query_key_value", ATTENTION, _falcon),),
    "mpt": (Fused("Wqkv", ATTENTION, _thirds),),
    "dbrx": (Fused("Wqkv", ATTENTION, _wholes),),
    "codegen": (Fused("qkv_proj", ATTENTION, _codegen),),
}
# What runtimes fuse of models that keep the parts apart, one part whole after the other.
RUNTIME = {"qkv_proj": ATTENTION, "gate_up_proj": GATES}


class Part(NamedTuple):
    """A part of a fused weight.

    Attributes:
        path: The fused weight's.
        rows: The part's.
    """

    path: str
    rows: Rows


def part_in(path: str, config: Config) -> Part | None:
    """What a part's name means in a model that fuses it; None where the model's family does not, or is not known.

    Args:
        path: A module's dotted path that ends in a part's name.
        config: The model's configuration; of a multimodal one that of its text, too.
    """
    stem, dot, leaf = path.rpartition(".")
    said = text_of(config)
    for fused in FAMILIES.get(str(said.get("model_type")), ()):
        rows = fused.rows(said)
        for names in fused.parts:
            if leaf in names and rows is not None:
                return Part(stem + dot + fused.leaf, rows[names.index(leaf)])
    return None


def text_of(config: Config) -> Config:
    """The configuration of the language model in a model's."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def parts_of(path: str, heights: Callable[[str], int | None]) -> list[Part] | None:
    """The parts that a model keeps apart of what a runtime's fused name means, with their rows in the fused weight.

    Args:
        path: A fused module's dotted path.
        heights: How many rows a path has in the model; None where it has no such path.

    Returns:
        None where the name is none of those, or the model lacks a part.
    """
    stem, dot, leaf = path.rpartition(".")
    for names in RUNTIME.get(leaf, ()):
        found = [heights(stem + dot + name) for name in names]
        known = [height for height in found if height]
        if len(known) == len(names):
            return [Part(stem + dot + name, rows) for name, rows in zip(names, in_turn(*known), strict=True)]
    return None


def fused_of(path: str) -> Iterator[str]:
    """The paths of fused weights that a module may be a part of, by any family's names."""
    stem, dot, leaf = path.rpartition(".")
    known = {(fused.leaf, names) for family in FAMILIES.values() for fused in family for names in fused.parts}
    known |= {(name, names) for name, choices in RUNTIME.items() for names in choices}
    for name, names in sorted(known):
        if leaf in names:
            yield stem + dot + name


def order_of(part: str, fused: str) -> tuple[str, ...] | None:
    """The names of all parts of a runtime's fused weight in their order; None where the name is none of those."""
    leaf = part.rpartition(".")[2]
    choices = RUNTIME.get(fused.rpartition(".")[2], ())
    return next((names for names in choices if leaf in names), None)
