"""torchtune's own layout: ``layers.0.attn.q_proj.lora_a.weight``, its modules as its own models call them.

Its models rotate neighbouring rows of queries and keys, where transformers rotates halves; those of Qwen 2 and Phi-3 do
as transformers does. The recipe states one rank and one alpha; torchtune repeats them in ``adapter_config.json``.
Source: torchtune 0.6 ``models/convert_weights.py`` and ``training/checkpointing/_checkpointer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools.errors import LayoutError
from loratools.formats import _carried, _peft_config
from loratools.formats._base import HEADS_KV, HEADS_Q, Document, Facts, Format, Group, Scale, cannot_hold
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef

# transformers' names by torchtune's, in a block and outside.
_BLOCK = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_HEAD = {"output": "lm_head"}
_BLOCK_BACK = {theirs: own for own, theirs in _BLOCK.items()}
_HEAD_BACK = {theirs: own for own, theirs in _HEAD.items()}
_IN_BLOCK = r"layers\.(\d+)\.(.+)"
_MODEL = "model."

_ORDERS = {"self_attn.q_proj": HEADS_Q, "self_attn.k_proj": HEADS_KV}
# Families whose rows torchtune has as transformers does.
_HALVES = ("qwen2", "qwen3", "phi3")
_SUFFIXES = {"down": "lora_a.weight", "up": "lora_b.weight"}


def translate(groups: Mapping[str, Group]) -> None:
    """Give modules the names that transformers has for them; a magnitude counts as torchtune's beside its factors.

    Args:
        groups: By stem.
    """
    for found in groups.values():
        if found.style == "torchtune":
            found.name = _theirs(found.name) or found.name


def _theirs(name: str) -> str | None:
    block = re.fullmatch(_IN_BLOCK, name)
    if block is None:
        return _HEAD.get(name)
    path = _BLOCK.get(block[2])
    return f"{_MODEL}layers.{block[1]}.{path}" if path is not None else None


def _own(path: str) -> str | None:
    block = re.fullmatch(_IN_BLOCK, path.removeprefix(_MODEL))
    if block is None:
        return _HEAD_BACK.get(path)
    name = _BLOCK_BACK.get(block[2])
    return f"layers.{block[1]}.{name}" if name is not None else None


def _read_path(family: str, path: str) -> str:  # noqa: ARG001
    return _theirs(_own(path) or "") or path


def _claims(facts: Facts) -> float:
    return 0.95 if facts.style == "torchtune" else 0.0


def _scaler(group: Group, component: str, rank: int, facts: Facts) -> Scale:  # noqa: ARG001
    if facts.config:
        return _peft_config.scale(facts.config, group.name, rank)
    return Scale(1.0, None, "torchtune keeps alpha in its recipe; a scale of 1 is assumed")


def _row_order(family: str, path: str) -> str:
    if family.startswith(_HALVES):
        return ""
    return _ORDERS.get(".".join(path.split(".")[-2:]), "")


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:  # noqa: ARG001
    name = _own(module.target.path)
    if name is None or module.target.rows is not None:
        raise cannot_hold(
            layout, "weights other than those of attention, MLP and output", [str(module.target)]
        )
    if module.kind != "lora" or any(len(ref.shape) != 2 for ref in module.factors.values()):
        raise cannot_hold(
            layout, f"modules of kind {module.kind}, convolutions and embeddings", [str(module.target)]
        )
    tensors = [ref.renamed(f"{name}.{_SUFFIXES[role]}") for role, ref in module.factors.items()]
    if module.magnitude is not None:
        magnitude = module.magnitude
        tensors.append(magnitude.reshaped((magnitude.numel,)).renamed(f"{name}.magnitude"))
    return tensors


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:
    ranks = sorted({module.rank or 1 for module in adapter.modules.values()})
    if len(ranks) > 1:
        raise LayoutError(
            f"the {layout.name} layout has one rank for all modules, and these have {', '.join(map(str, ranks))}",
            path=adapter.path or None,
            keys=[str(module.target) for module in adapter.modules.values() if module.rank != ranks[-1]],
            expected="One rank was expected",
            todo="`loratools convert FILE --to torchtune` brings them to one",
        )
    alpha = next(iter(adapter.modules.values())).scale * ranks[0]
    config = {
        "r": ranks[0],
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": sorted({target.path.rpartition(".")[2] for target in adapter.modules}),
        "peft_type": "LORA",
    }
    if any(module.magnitude is not None for module in adapter.modules.values()):
        config["use_dora"] = True
    return Document(tuple(tensors), _carried.metadata(adapter), config)


FORMAT = Format(
    name="torchtune",
    title="torchtune",
    claims=_claims,
    scaler=_scaler,
    speller=_speller,
    finisher=_finisher,
    folder=True,
    weights="adapter_0.safetensors",
    roles=frozenset({"up", "down", "magnitude"}),
    dialect="native",
    alpha="file",
    single=True,
    uniform=True,
    one_rank=True,
    fields=frozenset(),
    row_order=_row_order,
    read_path=_read_path,
)
