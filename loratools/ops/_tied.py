"""Embeddings that a model uses twice: as its inputs' and, transposed in use, as its output head.

A file holds a tied tensor once, and an adapter often changes one of the two uses. Then the head gets a tensor of its
own and the configuration says so. PEFT's semantics: LoRA on the embedding, and a copy saved by ``modules_to_save``,
change the inputs alone; trained tokens, and whatever was trained with ``ensure_weight_tying``, change both.
Sources: transformers ``_tied_weights_keys`` and ``tie_word_embeddings``; PEFT ``utils/other.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loratools.errors import ShapeError, UnsupportedKindError
from loratools.io.base import Base, Weight
from loratools.model import Adapter
from loratools.ops import _quantised, _replaced
from loratools.ops._changes import Added, Change, Plan, Term
from loratools.ops._tied_names import BIASES, FLAG, INSEPARABLE, Pair, is_tied, pairs, type_of
from loratools.ops._tied_uses import Use, are, is_shared, same_values, use_of


def resolve(base: Base, plan: Plan, adapters: Sequence[Adapter], strengths: Sequence[float]) -> Plan:
    """The plan with all uses of tied embeddings as the adapters mean them, and the vocabulary's new size.

    Args:
        base: The base model, with its configurations.
        plan: What adapters do to the tensors that it stores.
        adapters: Those that the plan is made of; what they hold for a head without a tensor is in its ``missing``.
        strengths: What the user multiplies each by.

    Returns:
        The plan; heads that need a tensor of their own are in ``added``, and ``config`` says that they are not tied.

    Raises:
        UnsupportedKindError: One use changes alone and the two cannot be told apart, or nothing says whether there
            are two.
        ShapeError: The embedding and the head would have different vocabularies.
        OptionError: As ``_replaced.vocabulary``.
    """
    for pair in pairs(base):
        plan = _separate(base, plan, pair, adapters, strengths)
    for part, said in _replaced.vocabulary(base, plan.changes).items():
        plan = plan._replace(config=_configured(base, plan, part, said))
    return _shared_bytes(base, plan)


def _separate(
    base: Base, plan: Plan, pair: Pair, adapters: Sequence[Adapter], strengths: Sequence[float]
) -> Plan:
    """The plan with the head's use of one embedding settled."""
    inputs = next(
        (each for each in plan.changes if (each.part, each.weight) == (pair.part, pair.weight)), None
    )
    terms = inputs.terms if inputs is not None else ()
    use = use_of(base, pair, terms, adapters, strengths)
    config = base.configs.get(pair.part, {})
    tied = is_tied(config)
    if tied is False or not (terms or any(use.own)) or (not config and _is_encoder(base, pair)):
        return plan
    if tied is None:
        raise _unknown(base, pair)
    plan = _claimed(plan, use)
    if are(terms, use.terms):
        return plan
    _refuse_inseparable(base, pair, config, terms, use.terms)
    return _untied(base, plan, pair, use.terms, inputs)


def _is_encoder(base: Base, pair: Pair) -> bool:
    """Whether a file is a text encoder of T5's kind, which has no head."""
    names = base.parts[pair.part]
    return pair.weight.key == "shared.weight" and not any(key.startswith("decoder.") for key in names)


def _claimed(plan: Plan, use: Use) -> Plan:
    """The plan without what the head takes as missing."""
    missing = tuple(
        tuple(name for name in names if name not in own)
        for names, own in zip(plan.missing, use.own, strict=True)
    )
    matched = tuple(before + found for before, found in zip(plan.matched, use.matched, strict=True))
    return plan._replace(missing=missing, matched=matched)


def _untied(base: Base, plan: Plan, pair: Pair, terms: tuple[Term, ...], inputs: Change | None) -> Plan:
    """The plan with a tensor for the head, and whatever else the switch ties."""
    component = inputs.component if inputs is not None else _component(plan)
    scale = _quantised.scale_of(base.parts[pair.part], pair.weight)
    if scale is not None:
        raise UnsupportedKindError(
            f"{pair.weight.key} is float8 with a scale, and cannot be copied for {pair.key}",
            path=base.path,
            keys=[pair.weight.key, scale.key],
            todo="Bake the adapter into the model in a wider dtype",
        )
    change = Change(pair.part, pair.weight, terms, pair.head, component) if terms else None
    added = [*plan.added, Added(pair.part, pair.key, pair.weight, change)]
    bias = base.parts[pair.part].get(BIASES.get(pair.head, ""))
    if bias is not None and f"{pair.head}.bias" not in base.parts[pair.part]:
        own = next((each for each in plan.changes if (each.part, each.weight) == (pair.part, bias)), None)
        added.append(Added(pair.part, f"{pair.head}.bias", bias, own))
    note = f"{pair.key} was tied to {pair.weight.key}, and has a tensor of its own now"
    said: dict[str, Any] = {FLAG: False}
    text = base.configs[pair.part].get("text_config")
    if isinstance(text, Mapping) and FLAG in text:
        said["text_config"] = {**text, FLAG: False}
    config = _configured(base, plan, pair.part, said)
    return plan._replace(added=tuple(added), config=config, notes=(*plan.notes, note))


def _component(plan: Plan) -> str:
    return next((change.component for change in plan.changes), "language_model")


def _configured(
    base: Base, plan: Plan, part: str, said: Mapping[str, Any]
) -> Mapping[str, Mapping[str, Any]]:
    """What changes in the configurations, with something more; what is nested is taken together."""
    before = plan.config.get(part, {})
    merged = {**before, **said}
    if "text_config" in before and "text_config" in said:
        original = base.configs[part]["text_config"]
        new = {key: value for key, value in said["text_config"].items() if original.get(key) != value}
        merged["text_config"] = {**before["text_config"], **new}
    return {**plan.config, part: merged}


def _height(terms: Iterable[Term], weight: Weight) -> int:
    heights = [term.tensor.shape[0] for term in terms if term.role == "replace" and term.tensor is not None]
    return [weight.shape[0], *heights][-1]


def _unknown(base: Base, pair: Pair) -> UnsupportedKindError:
    return UnsupportedKindError(
        f"{base.path} has no {pair.key}, and nothing says whether {pair.weight.key} is used for it too",
        keys=[pair.weight.key],
        expected=f"A config.json that states {FLAG} was expected beside the weights",
        todo="Give the model's folder, with its config.json",
    )


def _refuse_inseparable(
    base: Base, pair: Pair, config: Mapping[str, Any], inputs: Sequence[Term], head: Sequence[Term]
) -> None:
    """Refuse to part uses that the model cannot have apart, or that would not fit each other."""
    if type_of(config) in INSEPARABLE:
        raise UnsupportedKindError(
            f"the adapters change one use of {pair.weight.key} and not the other ({pair.key})",
            path=base.path,
            keys=[pair.weight.key],
            expected=f"A {type_of(config)} model whose embeddings are not tied does something else",
            todo="Leave the module out, or train both uses",
        )
    heights = _height(inputs, pair.weight), _height(head, pair.weight)
    if heights[0] != heights[1]:
        raise ShapeError(
            f"{pair.weight.key} would have {heights[0]} rows, {pair.key} {heights[1]}",
            path=base.path,
            keys=[pair.weight.key],
            expected="One vocabulary was expected",
            todo="Save the adapter again with save_embedding_layers=True",
        )


def _shared_bytes(base: Base, plan: Plan) -> Plan:
    """The plan for files in which two keys are one tensor: what changes one has to change the other alike."""
    changes = {(each.part, each.weight.key): each for each in plan.changes}
    places = _places(base, {each.part for each in plan.changes})
    further: list[Change] = []
    for change in plan.changes:
        for twin in _twins(places, change):
            other = changes.get((change.part, twin.key))
            if other is not None and same_values(change.terms, other.terms):
                continue
            if other is None and _replaced.is_vocabulary(twin.key) and all(map(is_shared, change.terms)):
                further.append(change._replace(weight=twin, target=twin.key.removesuffix(".weight")))
                continue
            raise UnsupportedKindError(
                f"{change.weight.key} and {twin.key} are one tensor in the file, and not both change alike",
                path=change.weight.file,
                keys=[change.weight.key, twin.key],
                expected="Tensors of their own were expected",
                todo="Save the model as safetensors, where they are apart or its configuration ties them",
            )
    return plan._replace(changes=(*plan.changes, *further)) if further else plan


def _places(base: Base, parts: Iterable[str]) -> dict[tuple[str, int], list[Weight]]:
    """The tensors of some parts by where their bytes lie."""
    found: dict[tuple[str, int], list[Weight]] = {}
    for part in parts:
        for weight in base.parts[part].values():
            if weight.start is not None and weight.nbytes:
                found.setdefault((weight.file, weight.start), []).append(weight)
    return found


def _twins(places: Mapping[tuple[str, int], list[Weight]], change: Change) -> list[Weight]:
    """The other keys of a tensor's very bytes."""
    own = change.weight
    alike = places.get((own.file, own.start), ()) if own.start is not None else ()
    return [weight for weight in alike if weight.key != own.key]
