"""llama.cpp's adapters: GGUF with ``<weight>.lora_a`` (rank, in) and ``<weight>.lora_b`` (out, rank).

One alpha, in the header, counts for all modules: a module's scale is alpha over the rank of its own tensors, or 1 where
alpha is 0. Names are llama.cpp's, and rows lie in the order of its own models (see ``_gguf_tables``). The embedding's
``lora_a`` is transposed; factors for all experts of a layer are stacked. Norms may lie beside, whole; llama.cpp passes
over them. Source: llama.cpp ``src/llama-adapter.cpp`` and ``convert_lora_to_gguf.py``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from loratools.archs._experts import GGUF
from loratools.errors import LayoutError, MalformedFileError
from loratools.formats import _carried, _gguf_names
from loratools.formats._base import Document, Facts, Format, Group, Scale, cannot_hold
from loratools.formats._gguf_names import ARCHITECTURE
from loratools.formats._gguf_tables import GgufArch
from loratools.formats._group import PEFT
from loratools.io import json_text
from loratools.model import Adapter, Layout, Module
from loratools.tensors import TensorRef

_ALPHA = "adapter.lora.alpha"
_TYPE = "adapter.type"
_INVOCATION = "adapter.alora.invocation_tokens"
_WEIGHT = ".weight"
_EMBEDDING = "token_embd"
_EXPERTS = ".experts."
# What the header says of any adapter, before all else.
_SAID = {"general.type": "adapter", _TYPE: "lora"}


def translate(groups: Mapping[str, Group], metadata: Mapping[str, str]) -> None:
    """Give modules the names that transformers has for them, where their architecture is described.

    Args:
        groups: By stem; the embedding's factors get roles of their own, in their logical orientation.
        metadata: The header's.
    """
    arch = _gguf_names.arch_of(metadata.get(ARCHITECTURE, ""))
    for found in groups.values():
        own = found.stem.removesuffix(_WEIGHT)
        found.style = "gguf"
        found.in_first = arch is not None and own.rpartition(".")[2] in arch.turned
        found.name = (_gguf_names.understood(arch, own) if arch is not None else None) or own
        if own == _EMBEDDING and found.roles.keys() == {"up", "down"}:
            up, down = found.roles["up"], found.roles["down"]
            found.roles = {"embedding_down": down.flipped(), "embedding_up": up}


def _claims(facts: Facts) -> float:
    return 1.0 if facts.container == "gguf" else 0.0


def _scaler(group: Group, component: str, rank: int, facts: Facts) -> Scale:  # noqa: ARG001
    alpha = float(facts.metadata.get(_ALPHA, "0"))
    if not alpha:
        return Scale(1.0, None, "the header states no alpha, which llama.cpp reads as a scale of 1")
    return Scale(alpha / rank, alpha)


def _family(adapter: Adapter, model_type: str) -> str | None:
    if adapter.layout.name == "gguf":
        return adapter.metadata.get(ARCHITECTURE)
    arch = _gguf_names.of_model_type(model_type)
    return arch.name if arch is not None else None


def _row_order(family: str, path: str) -> str:
    arch = _gguf_names.arch_of(family)
    name = _gguf_names.spelt(arch, path) if arch is not None else None
    return arch.orders.get(name.rpartition(".")[2], "") if arch is not None and name else ""


def _read_path(family: str, path: str) -> str:
    arch = _gguf_names.arch_of(family)
    name = _gguf_names.spelt(arch, path) if arch is not None else None
    return (_gguf_names.understood(arch, name) if arch is not None and name else None) or name or path


def _arch(adapter: Adapter, layout: Layout) -> GgufArch:
    """The architecture whose names are written.

    Raises:
        LayoutError: Nothing says it, or nobody has described it.
    """
    name = adapter.metadata.get(ARCHITECTURE, "")
    arch = _gguf_names.arch_of(name)
    if arch is None:
        what = f"models of the architecture {name}" if name else "a model of unknown architecture"
        todo = "Give the model that the adapter is for with --base: a folder with its config.json is enough"
        raise cannot_hold(layout, what, [], todo)
    return arch


def _speller(module: Module, adapter: Adapter, layout: Layout) -> list[TensorRef]:
    name = _gguf_names.spelt(_arch(adapter, layout), module.target.path)
    if name is None and _EXPERTS in f".{module.target.path}.":
        what = (
            "experts that are apart, or packed in two axes: llama.cpp has those of a layer stacked in three"
        )
        raise cannot_hold(layout, what, [str(module.target)])
    if name is None:
        what = f"{module.target.path}, which llama.cpp has no name for in {adapter.metadata[ARCHITECTURE]} models"
        raise cannot_hold(layout, what, [str(module.target)])
    problem = _problem(module, name)
    if problem:
        raise cannot_hold(layout, problem, [str(module.target)])
    up, down = module.factors["up"], module.factors["down"]
    if name == _EMBEDDING:
        down = down.flipped()
    return [down.renamed(f"{name}{_WEIGHT}.lora_a"), up.renamed(f"{name}{_WEIGHT}.lora_b")]


def _problem(module: Module, name: str) -> str:
    """What llama.cpp has no place for in a module; empty where it has for all."""
    if module.target.rows is not None:
        return f"part of the fused {name}"
    if module.kind not in ("lora", "experts"):
        return f"modules of kind {module.kind}"
    if module.factors.keys() != {"up", "down"}:
        return "tensors beside up and down"
    stacked = module.kind == "experts"
    if any(len(ref.shape) != (3 if stacked else 2) for ref in module.factors.values()):
        return "factors of other than three axes" if stacked else "convolutions"
    if (module.op == "embedding") != (name == _EMBEDDING):
        return f"the factors of an embedding for {name}"
    return ""


def _adopt(ref: TensorRef, adapter: Adapter) -> TensorRef | None:
    """A norm that was saved whole: the one thing that may lie beside the modules."""
    arch = _gguf_names.arch_of(adapter.metadata.get(ARCHITECTURE, ""))
    key = ref.name.removeprefix(PEFT)
    if arch is None or arch.shifted or len(ref.shape) != 1 or not key.endswith(_WEIGHT):
        return None
    name = _gguf_names.spelt(arch, key.removesuffix(_WEIGHT))
    return ref.renamed(name + _WEIGHT) if name is not None and name.endswith("_norm") else None


def _finisher(adapter: Adapter, tensors: list[TensorRef], layout: Layout) -> Document:
    """The document, with the one alpha of all modules in its header."""
    arch = _arch(adapter, layout)
    alphas = {_single(module.scale * (module.rank or 1)) for module in adapter.modules.values()}
    if len(alphas) > 1 and all(module.scale == 1.0 for module in adapter.modules.values()):
        alphas = {0.0}  # which is read as a scale of 1, whatever the rank
    if len(alphas) > 1:
        raise LayoutError(
            f"the {layout.name} layout has one alpha for all modules, and these have {len(alphas)}",
            path=adapter.path or None,
            keys=[f"{alpha:g}" for alpha in sorted(alphas)],
            todo="`loratools convert FILE --to gguf` brings them to one",
        )
    alpha = alphas.pop()
    first = {ARCHITECTURE: arch.name, **_SAID, _ALPHA: repr(alpha)}
    metadata = {**first, **_carried.metadata(adapter), **first}
    metadata.pop("format", None)  # what safetensors says of the library that wrote it
    tokens = adapter.config.get("alora_invocation_tokens")
    if isinstance(tokens, list) and tokens:
        metadata[_INVOCATION] = json.dumps(tokens)
    return Document(tuple(tensors), metadata, ordered=True)


def said(adapter: Adapter) -> dict[str, Any]:
    """What the header says that belongs into a configuration of PEFT: the tokens that invoke the adapter (aLoRA).

    Raises:
        MalformedFileError: They are no list.
    """
    text = adapter.metadata.get(_INVOCATION)
    if text is None:
        return {}
    try:
        tokens = json_text.loads(text)
    except ValueError:
        tokens = None
    if not isinstance(tokens, list):
        raise MalformedFileError(
            f"{_INVOCATION} is {text!r}", path=adapter.path or None, expected="A list of tokens was expected"
        )
    return {"alora_invocation_tokens": tokens}


def _single(value: float) -> float:
    """A number as the header's float32 has it."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


FORMAT = Format(
    name="gguf",
    title="GGUF",
    claims=_claims,
    scaler=_scaler,
    speller=_speller,
    finisher=_finisher,
    roles=frozenset({"up", "down"}),
    dialect="native",
    alpha="file",
    adopt=_adopt,
    single=True,
    container="gguf",
    family=_family,
    row_order=_row_order,
    read_path=_read_path,
    hosted=True,
    fields=frozenset({"alora_invocation_tokens"}),
    experts=(GGUF,),
)
