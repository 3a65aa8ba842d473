"""How model families call the weights of their experts: one by one, fused in two parameters, or stacked in three.

Per expert ("split"), every expert is a module of its own with gate, up and down. Fused, as transformers 5 and PEFT's
``target_parameters`` have them, all experts of a layer are two parameters, ``gate_up_proj`` and ``down_proj``. MLX
("switch") and llama.cpp ("gguf") stack the experts, and keep gate and up apart.
Sources: transformers 5.23 ``conversion_mapping.py`` and ``models/*/modeling_*.py``; mlx-lm 0.32 ``models/*.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import NamedTuple

SPLIT, FUSED, SWITCH, GGUF = "split", "fused", "switch", "gguf"

# In which order transformers registers the parameters of experts, and so the order in which PEFT wraps them.
REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")

_LEAVES = {"gate_up": "gate_up_proj", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_ROLES = {leaf: role for role, leaf in _LEAVES.items()}
# Whatever llama.cpp's own names are, the common model has one for them.
_GGUF_OWNER = "mlp.experts"
_NUMBER = "#"


class Experts(NamedTuple):
    """One family's names, each below a block such as ``model.layers.0.``.

    Attributes:
        name: The family, as ``model_type`` has its first member.
        model_types: Those whose experts are called so.
        split: The module of one expert, with # for its number.
        names: Its gate, up and down.
        fused: The module that owns the two parameters of all experts.
        switch: The module of MLX's stacked layers.
        interleaved: Whether gate and up alternate, row by row, in ``gate_up_proj``; else gate comes first.
        turned: Whether the parameters are stored as (experts, in, out) and the model does not tell PEFT, whose factors
            are then those of the transposed weight.
    """

    name: str
    model_types: tuple[str, ...]
    split: str
    names: tuple[str, str, str]
    fused: str
    switch: str
    interleaved: bool = False
    turned: bool = False

    @property
    def usual(self) -> bool:
        """Whether gate and up lie one behind the other, stored as linear layers are."""
        return not self.interleaved and not self.turned


_PROJ = ("gate_proj", "up_proj", "down_proj")
_W = ("w1", "w3", "w2")

FAMILIES: tuple[Experts, ...] = (
    Experts(
        "mixtral",
        ("mixtral", "minimax", "minimax_m2", "minimax_m3_vl", "phimoe", "kimi_linear"),
        "block_sparse_moe.experts.#",
        _W,
        "mlp.experts",
        "block_sparse_moe.switch_mlp",
    ),
    Experts(
        "qwen2_moe",
        (
            *("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "qwen3_omni_moe", "qwen3_5_moe"),
            *("qwen3_vl_moe_text", "qwen3_omni_moe_text", "qwen3_5_moe_text"),
            *("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "olmoe", "flex_olmo"),
            *("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "dots1", "ernie4_5_moe", "exaone_moe"),
            *("hunyuan_v1_moe", "longcat_flash", "afmoe", "mimo_v2_flash", "bailing_hybrid", "solar_open"),
            *("cohere2_moe", "mellum", "laguna"),
        ),
        "mlp.experts.#",
        _PROJ,
        "mlp.experts",
        "mlp.switch_mlp",
    ),
    Experts(
        "jamba",
        ("jamba",),
        "feed_forward.experts.#",
        _PROJ,
        "feed_forward.experts",
        "feed_forward.switch_mlp",
    ),
    Experts(
        "lfm2_moe",
        ("lfm2_moe",),
        "feed_forward.experts.#",
        _W,
        "feed_forward.experts",
        "feed_forward.switch_mlp",
    ),
    Experts(
        "llama4",
        ("llama4", "llama4_text"),
        "feed_forward.experts.#",
        _PROJ,
        "feed_forward.experts",
        "feed_forward.experts",
        turned=True,
    ),
    Experts("gpt_oss", ("gpt_oss",), "mlp.experts.#", _PROJ, "mlp.experts", "mlp.experts", interleaved=True),
)


class Place(NamedTuple):
    """What a path says of experts.

    Attributes:
        block: What stands before, such as ``model.layers.0.``.
        role: "gate", "up", "down", or "gate_up" for the two as one weight.
        number: Of the expert; None for all of them.
        families: Those whose name it may be.
    """

    block: str
    role: str
    number: int | None
    families: tuple[Experts, ...]


@lru_cache(maxsize=4096)
def place(path: str) -> Place | None:
    """Which experts' weight a path names; None where it is none that a family is known for."""
    found: dict[tuple[str, str, int | None], list[Experts]] = {}
    for family in FAMILIES:
        for pattern, roles in _patterns(family):
            match = pattern.fullmatch(path)
            if match is None:
                continue
            number = match["number"] if "number" in pattern.groupindex else None
            key = (match["block"] or "", roles[match["leaf"]], None if number is None else int(number))
            owners = found.setdefault(key, [])
            if family not in owners:
                owners.append(family)
    for (block, role, count), families in found.items():
        return Place(block, role, count, tuple(families))
    return None


def is_experts(path: str) -> bool:
    """Whether a path names the weights of experts."""
    return place(path) is not None


@cache
def _patterns(family: Experts) -> tuple[tuple[re.Pattern[str], dict[str, str]], ...]:
    """What paths of a family look like, and which role each last word has."""
    own = dict(zip(family.names, ("gate", "up", "down"), strict=True))
    fused = {leaf: role for leaf, role in _ROLES.items() if role in ("gate_up", "down")}
    apart = {leaf: role for leaf, role in _ROLES.items() if role != "gate_up"}
    owners = ((family.split, own), (family.fused, fused), (family.switch, apart), (_GGUF_OWNER, apart))
    return tuple((_pattern(owner, roles), roles) for owner, roles in owners)


def _pattern(owner: str, leaves: Iterable[str]) -> re.Pattern[str]:
    numbered = re.escape(owner).replace(re.escape(_NUMBER), r"(?P<number>\d+)")
    return re.compile(rf"(?P<block>(?:.*\.)?){numbered}\.(?P<leaf>{'|'.join(leaves)})")


def spell(family: Experts, style: str, block: str, role: str, number: int | None = None) -> str:
    """The path of experts' weights in a style.

    Args:
        family: Whose names.
        style: "split", "fused", "switch" or "gguf".
        block: What stands before.
        role: "gate", "up", "down", or "gate_up" in the fused style.
        number: Of the expert, in the split style.
    """
    if style == SPLIT:
        own = dict(zip(("gate", "up", "down"), family.names, strict=True))
        return f"{block}{family.split.replace(_NUMBER, str(number))}.{own[role]}"
    owner = {FUSED: family.fused, SWITCH: family.switch, GGUF: _GGUF_OWNER}[style]
    return f"{block}{owner}.{_LEAVES[role]}"


def of_model_type(model_type: str) -> Experts | None:
    """The family of models with this ``model_type`` in their configuration; None where it is not described."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def of_model_name(name: str) -> Experts | None:
    """The family that a model's published name contains, such as ``mistralai/Mixtral-8x7B``; None where none does."""
    plain = _plain(name.rpartition("/")[2])
    types = [(kind, family) for family in FAMILIES for kind in family.model_types]
    found = [(len(kind), family) for kind, family in types if _is_named(_plain(kind), plain)]
    return max(found, key=lambda each: each[0])[1] if found else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _is_named(kind: str, name: str) -> bool:
    # Names of mixtures say how many parameters act ("30B-A3B") where the type says "moe".
    if kind.endswith("moe") and kind.removesuffix("moe") in name:
        return "moe" in name or re.search(r"\d+ba\d+", name) is not None
    return kind in name


def is_owner(path: str) -> bool:
    """Whether a module of this path owns parameters for all experts of a layer."""
    return any(path == family.fused or path.endswith("." + family.fused) for family in FAMILIES)
