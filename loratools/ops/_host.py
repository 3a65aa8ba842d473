"""The model that an adapter is for, as its configuration describes it: its type, its heads, its ties.

Rows of queries and keys lie in the order of the program that runs them, and how many heads there are no adapter says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from loratools import archs
from loratools.errors import LayoutError, MissingFileError, OptionError
from loratools.formats import Format
from loratools.formats._gguf_names import ARCHITECTURE, arch_of, near
from loratools.io.base import Base, config_of, keys_of
from loratools.model import EMPTY, Adapter
from loratools.ops._fit import Fitted, Misfit

PathLike = str | os.PathLike[str]

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Output layers, by the last word of their paths.
_OUTPUTS = ("lm_head", "embed_out")


class Host(NamedTuple):
    """What is known of the model.

    Attributes:
        path: The configuration, for messages; empty where none was given.
        model_type: As the configuration says it, or empty.
        heads: How many heads queries have; 0 where that is unknown.
        kv_heads: How many heads keys have; 0 where that is unknown.
        tied: Whether its output layer is its embedding.
        layers: How many layers it has; 0 where that is unknown.
        config: Its configuration, or empty.
    """

    path: str = ""
    model_type: str = ""
    heads: int = 0
    kv_heads: int = 0
    tied: bool = False
    layers: int = 0
    config: Mapping[str, Any] = EMPTY


def of(
    base: PathLike | None, heads: int | None = None, kv_heads: int | None = None
) -> tuple[Host, Base | None]:
    """What a base says of the model, and its weights where it has any.

    Args:
        base: A checkpoint, a model's folder (its config.json is enough), or a configuration; or None.
        heads: How many heads queries have, where the caller says so.
        kv_heads: How many heads keys have, where the caller says so.

    Raises:
        OptionError: Fewer than one head, or heads of keys that do not divide those of queries.
        LoraError: The base cannot be read.
    """
    found, weights = Host(), None
    if base is not None:
        path, config = config_of(base)
        found = described(path, config)
        try:
            weights = keys_of(base)
        except MissingFileError:
            # The weights matter to names alone; a configuration tells the rest.
            if not config:
                raise
    found = found._replace(heads=heads or found.heads, kv_heads=kv_heads or found.kv_heads)
    if found.heads and found.kv_heads and found.heads % found.kv_heads:
        raise OptionError(
            f"{found.kv_heads} heads of keys do not divide {found.heads} heads of queries",
            todo="Give both as the model's config.json has them: --heads, --kv-heads",
        )
    return found, weights


def described(path: str, config: Mapping[str, Any]) -> Host:
    """What a configuration of transformers says; that of the language model inside where there are several."""
    inner = config.get("text_config")
    said = {**config, **inner} if isinstance(inner, Mapping) else config
    heads = _count(said, _HEADS)
    kv_heads = _count(said, _KV_HEADS) or heads
    if "multi_query" in said and not said.get("new_decoder_architecture"):
        # Falcon's first generation has one head of keys, or as many as of queries, whatever else is stated.
        kv_heads = 1 if said["multi_query"] else heads
    kind = str(config.get("model_type") or said.get("model_type") or "")
    return Host(
        path,
        kind,
        heads,
        kv_heads,
        bool(config.get("tie_word_embeddings", said.get("tie_word_embeddings"))),
        _count(said, _LAYERS),
        config,
    )


def _count(config: Mapping[str, Any], names: Iterable[str]) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def settled(adapter: Adapter, form: Format, host: Host) -> Adapter:
    """The adapter that knows of which family it is, where the layout to write depends on it.

    Raises:
        LayoutError: Nothing says it, or the layout has no names for this family.
    """
    if adapter.layout.name == form.name:
        return adapter
    _refuse_undescribed(adapter)
    if not form.hosted:
        return adapter
    family = form.family(adapter, host.model_type)
    if family is None:
        raise _familyless(adapter, form, host)
    return replace(adapter, metadata={**adapter.metadata, ARCHITECTURE: family})


def _refuse_undescribed(adapter: Adapter) -> None:
    """Refuse to leave a layout whose names and rows depend on an architecture that nobody has described.

    Raises:
        LayoutError: The adapter is in such a one.
    """
    name = adapter.metadata.get(ARCHITECTURE, "")
    if adapter.layout.name != "gguf" or arch_of(name) is not None:
        return
    raise LayoutError(
        f"{ARCHITECTURE} is {name}, whose names are not described"
        if name
        else f"no {ARCHITECTURE} is stated",
        path=adapter.path or None,
        candidates=near(name),
        expected="An architecture was expected whose names and order of rows are known",
        todo="Convert the adapter that the file was made from; `loratools info` describes this one",
    )


def _familyless(adapter: Adapter, form: Format, host: Host) -> LayoutError:
    """The error for a model that a layout has no names for, or of which nothing says what it is."""
    expected, todo = (
        "A language model whose names are described was expected",
        "Choose another layout with --to",
    )
    if archs.get(adapter.arch).has_table:
        what = f"a {archs.get(adapter.arch).title} adapter"
    elif host.model_type:
        what = f"models of type {host.model_type} ({host.path})"
    else:
        what = "a model of unknown type"
        expected = "Its names and the order of its rows depend on the model's type"
        todo = "Give the model that the adapter is for with --base: a folder with its config.json is enough"
    keys = [ref.name for module in adapter.modules.values() for _, ref in module.tensors() if ref.name]
    return LayoutError(
        f"the {form.name} layout cannot hold {what}",
        path=adapter.path or None,
        keys=keys or [str(target) for target in adapter.modules],
        candidates=near(host.model_type),
        expected=expected,
        todo=todo,
    )


def without_outputs(fitted: Sequence[Fitted], form: Format, host: Host) -> list[Fitted]:
    """Modules as a layout will write them, without those of an output layer that the model there does not have."""
    if not form.hosted or not host.tied:
        return list(fitted)
    return [_untied(each) for each in fitted]


def _untied(fitted: Fitted) -> Fitted:
    module = fitted.module
    if module is None or module.target.path.rpartition(".")[2] not in _OUTPUTS:
        return fitted
    keys = tuple(ref.name for source in fitted.step.sources for _, ref in source.tensors() if ref.name)
    reason = (
        f"{module.target.path} is the model's embedding (tie_word_embeddings), which has no second name there"
    )
    return Fitted(fitted.step, misfits=(Misfit("unnamed", keys, reason),))
