"""Bases and adapters of which only names and small factors exist, and their plans: what tests of ties share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loratools.io.base import Base, Weight
from loratools.model import Adapter, Layout, Module, Target
from loratools.ops import _replaced
from loratools.ops._changes import Change, Plan, Term
from loratools.ops._tied import resolve
from loratools.tensors import from_torch
from tests.ops.plain_bake import applied

PREFIX = "base_model.model."
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
ROWS = {PREFIX + "model.embed_tokens.token_adapter.trainable_tokens_delta": torch.full((2, 4), 3.0)}


def base_of(
    config: Mapping[str, Any], keys: Sequence[str] = (EMBED,), file: str = "model.safetensors"
) -> Base:
    weights = {key: Weight(key, (6, 4), "F32", file) for key in keys}
    return Base("base", {"": weights}, configs={"": config} if config else {})


def lora(path: str, seed: int = 0, shape: tuple[int, int] = (6, 4), **fields: Any) -> Module:
    torch.manual_seed(seed)
    factors = {
        "up": from_torch("up", torch.randn(shape[0], 2)),
        "down": from_torch("down", torch.randn(2, shape[1])),
    }
    return Module(Target("language_model", path), "lora", factors, rank=2, shape=shape, **fields)


def adapter(*modules: Module, tensors: Mapping[str, torch.Tensor] | None = None, **config: Any) -> Adapter:
    extras = {key: from_torch(key, tensor) for key, tensor in (tensors or {}).items()}
    return Adapter({each.target: each for each in modules}, extras, layout=Layout("peft"), config=config)


def planned(base: Base, adapters: Sequence[Adapter]) -> Plan:
    """A plan by names alone, before ties are looked at."""
    terms: dict[str, list[Term]] = {}
    missing: list[tuple[str, ...]] = []
    matched: list[int] = []

    def find(_: str, key: str) -> tuple[str, Weight] | None:
        weight = base.parts[""].get(key)
        return None if weight is None else ("", weight)

    for position, each in enumerate(adapters):
        made, lost = _replaced.terms(each, position, 1.0, base, find)
        for _, weight, term in made:
            terms.setdefault(weight.key, []).append(term)
        found = 0
        for module in each.modules.values():
            key = f"{module.target.path}.weight"
            if key in base.parts[""]:
                terms.setdefault(key, []).append(Term(position, 1.0, "weight", module))
                found += 1
            else:
                lost.append(str(module.target))
        missing.append(tuple(lost))
        matched.append(found)
    changes = tuple(
        Change("", base.parts[""][key], tuple(each), key, "language_model") for key, each in terms.items()
    )
    return Plan("llm", changes, missing=tuple(missing), matched=tuple(matched))


def resolved(base: Base, *adapters: Adapter) -> Plan:
    return resolve(base, planned(base, adapters), adapters, [1.0] * len(adapters))


def after(plan: Plan, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding and the head of a baked model."""
    changed = {change.weight.key: applied(change.terms, before) for change in plan.changes}
    embedding = changed.get(EMBED, before.double())
    if not plan.added:
        return embedding, embedding
    (head,) = plan.added
    return embedding, applied(head.change.terms, before) if head.change is not None else before.double()
