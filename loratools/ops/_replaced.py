"""Tensors that PEFT saves in full beside its factors, and the ones of the base that they replace.

These are modules saved whole (``modules_to_save``), the biases of ``bias="all"`` and ``"lora_only"``, embeddings of a
resized vocabulary (``save_embedding_layers``) and rows of embeddings (``trainable_token_indices``). All of them hold
new values, not differences. Sources: PEFT ``utils/save_and_load.py``, ``utils/other.py`` (ModulesToSaveWrapper,
TrainableTokensWrapper) and ``tuners/trainable_tokens``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from loratools.errors import MalformedFileError, OptionError, ShapeError
from loratools.formats._group import clean
from loratools.io.base import Base, Weight
from loratools.model import Adapter
from loratools.ops._changes import Change, Term
from loratools.tensors import TensorRef

Find = Callable[[str, str], "tuple[str, Weight] | None"]
"""The part and the tensor of a component ("" for any) that a whole key of a base means, or None."""

# What PEFT's wrappers put before the name of a parameter; the last two may be followed by the adapter's name.
_BASES = ("base_layer", "original_module")
_SAVED = "modules_to_save"
_TOKENS = "token_adapter"
_ROWS = "trainable_tokens_delta"
# A copy of the base's own rows, kept so that a merge can be undone.
_ORIGINAL_ROWS = "trainable_tokens_original"
# What VeLoRA and MonteCLoRA keep of their training, without which their layers compute what plain ones do.
_TRAINING = frozenset(("lora_velora_embed", "lora_monteclora_sampler"))
# Modules that have one row for each word of the vocabulary.
_VOCABULARY = (
    *("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "proj_out"),
    *("tok_embeddings", "vocab_projector", "generator_lm_head"),
)
# Heads whose last word alone is too common.
_HEADS = ("predictions.decoder", "lm_head.decoder", "cls.predictions", "vocab_projector")
# What libraries and their releases put before the same name.
_WRAPPERS = (
    "",
    "model.",
    "transformer.",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
)


class Saved(NamedTuple):
    """One tensor that an adapter holds in full.

    Attributes:
        ref: As the file has it.
        key: The base's tensor that it stands for, in PEFT's names.
        role: "replace", "rows", or "base": the base's own values, as they were when the adapter was trained.
    """

    ref: TensorRef
    key: str
    role: str


def terms(
    adapter: Adapter, position: int, strength: float, base: Base, find: Find
) -> tuple[list[tuple[str, Weight, Term]], list[str]]:
    """What the tensors of an adapter that belong to no module do to the base.

    The base's own values, which PEFT saves beside an adapted embedding, count only where the vocabulary was resized;
    they come before all other terms of their tensor.

    Args:
        adapter: Of any layout; only PEFT's has tensors that mean something to a checkpoint.
        position: Of the adapter among those that are baked.
        strength: W becomes W + strength · (M − W).
        base: For messages.
        find: Looks a key up in the base.

    Returns:
        Part, tensor and term of each; and the keys that the base has no place for.

    Raises:
        ShapeError: A tensor has another shape than the base's, and not only more or fewer words of the vocabulary.
        OptionError: The vocabulary changes, and the strength is not 1.
        MalformedFileError: The configuration does not say which rows the adapter holds.
    """
    if not is_peft(adapter):
        return [], [key for key in adapter.extras if not _means_nothing(key)]
    made: list[tuple[str, Weight, Term]] = []
    missing: list[str] = []
    heights: dict[str, int] = {}
    for saved in sorted(kept_whole(adapter), key=lambda each: each.role != "base"):
        found = _found(saved.key, find)
        if found is None:
            if saved.role != "base":
                missing.append(saved.ref.name)
            continue
        part, weight = found
        if saved.role == "base" and saved.ref.shape == weight.shape:
            continue
        term = Term(position, strength, "replace", tensor=saved.ref)
        if saved.role == "rows":
            places = rows_of(adapter, saved)
            _check_rows(adapter, saved, places, weight, heights.get(saved.key))
            term = term._replace(role="rows", places=places)
        else:
            _check_shape(adapter, saved, weight, strength, base)
            heights[saved.key] = saved.ref.shape[0] if saved.ref.shape else 1
        made.append((part, weight, term))
    return made, missing


def is_vocabulary(key: str) -> bool:
    """Whether a tensor has a row for each word, by its name: an embedding of the inputs, or a head."""
    module = key.rpartition(".")[0]
    return module.rpartition(".")[2] in _VOCABULARY or module.endswith(_HEADS)


def is_base_copy(term: Term) -> bool:
    """Whether a term puts the base's own values into place, as they were when the adapter was trained."""
    return term.role == "replace" and term.tensor is not None and _split(term.tensor.name)[1] == "base"


def vocabulary(base: Base, changes: Iterable[Change]) -> dict[str, dict[str, Any]]:
    """What a resized vocabulary changes in the configurations: ``vocab_size``, by part.

    Raises:
        OptionError: Two adapters replace a tensor that one of them resizes.
        ShapeError: The vocabularies of a part differ after it: one of two embeddings was resized, or each to another
            size.
    """
    sizes: dict[str, dict[str, int]] = {}
    for change in changes:
        replaced = [term for term in change.terms if term.role == "replace" and term.tensor is not None]
        heights = [term.tensor.shape for term in replaced if term.tensor is not None]
        if all(shape == change.weight.shape for shape in heights):
            continue
        if len({term.adapter for term in change.terms}) > 1:
            raise OptionError(
                f"{len(heights)} adapters change a tensor that one of them resizes",
                path=base.path,
                keys=[change.weight.key],
                expected="One adapter was expected to decide how many words there are",
                todo="Bake the adapter with the other vocabulary first, by itself, and the others into the result",
            )
        sizes.setdefault(change.part, {})[change.weight.key] = heights[-1][0]
    for part, resized in sizes.items():
        _check_even(base, part, resized)
    return {part: _said(base, part, next(iter(resized.values()))) for part, resized in sizes.items()}


def _check_even(base: Base, part: str, resized: Mapping[str, int]) -> None:
    left = {
        key: weight.shape[0]
        for key, weight in base.parts[part].items()
        if key not in resized and is_vocabulary(key) and weight.shape
    }
    before = {base.parts[part][key].shape[0] for key in resized if key in base.parts[part]}
    uneven = {key: height for key, height in left.items() if height in before}
    if len({*resized.values()}) == 1 and not uneven:
        return
    raise ShapeError(
        "the vocabulary would have several sizes: "
        + ", ".join(f"{key} {height}" for key, height in {**resized, **uneven}.items()),
        path=base.path,
        keys=list(uneven) or list(resized),
        expected="The adapter was expected to hold both the embedding and the head at their new size",
        todo="Save the adapter again with save_embedding_layers=True",
    )


def _said(base: Base, part: str, size: int) -> dict[str, Any]:
    """``vocab_size`` where the configuration of a part has it."""
    config = base.configs.get(part, {})
    text = config.get("text_config")
    if isinstance(text, Mapping) and "vocab_size" not in config:
        return {"text_config": {**text, "vocab_size": size}}
    return {"vocab_size": size}


def is_peft(adapter: Adapter) -> bool:
    """Whether an adapter's tensors of no module are PEFT's."""
    return adapter.layout.name == "peft" or "peft_type" in adapter.config


def _means_nothing(key: str) -> bool:
    # An alpha without factors multiplies nothing.
    return key.endswith(".alpha")


def kept_whole(adapter: Adapter) -> list[Saved]:
    """What the extras of an adapter of PEFT's stand for, each tensor of the base once for each role."""
    found: dict[tuple[str, str], Saved] = {}
    for name, ref in adapter.extras.items():
        key, role = _split(name)
        # A resized model has the tuned values twice, with and without the wrapper's name.
        if role and ((key, role) not in found or _SAVED not in name):
            found[key, role] = Saved(ref, key, role)
    return list(found.values())


def _split(name: str) -> tuple[str, str]:
    """The base's key that a key of the file stands for, and the role; an empty role where it does nothing."""
    module, _, leaf = clean(name).rpartition(".")
    words = module.split(".")
    if _ORIGINAL_ROWS in (leaf, *words[-1:]) or not _TRAINING.isdisjoint((leaf, *words)):
        return name, ""
    for end in (_ROWS, _SAVED):
        # The adapter's name may follow: "….modules_to_save.default.weight".
        if end in words[-2:] or leaf == end:
            inner = words[: words.index(end)] if end in words else words
            own = [word for word in inner if word != _TOKENS]
            return ".".join([*own, "weight" if end == _ROWS else leaf]), "rows" if end == _ROWS else "replace"
    kept = [word for word in words if word not in (*_BASES, _TOKENS)]
    # PEFT trains the biases of modules that it wraps; their weights it does not.
    wrapped = len(kept) < len(words) and not (leaf == "bias" and words[-1] == _BASES[0])
    return ".".join([*kept, leaf]), "base" if wrapped else "replace"


def _found(key: str, find: Find) -> tuple[str, Weight] | None:
    """The base's tensor of a key, which may stand under another wrapper there."""
    return next((found for name in wrapped(key) if (found := find("", name)) is not None), None)


def wrapped(key: str) -> Iterator[str]:
    """A key, and what it may be called in other releases of the libraries that write checkpoints."""
    seen: set[str] = set()
    for off in ("", *_WRAPPERS[:0:-1]):
        if not key.startswith(off):
            continue
        for on in _WRAPPERS:
            name = on + key[len(off) :]
            if name not in seen:
                seen.add(name)
                yield name


def rows_of(adapter: Adapter, saved: Saved) -> tuple[int, ...]:
    """Which rows an adapter holds of a tensor whose role is "rows", by its configuration.

    Raises:
        MalformedFileError: It does not say.
    """
    said = adapter.config.get("trainable_token_indices", adapter.config.get("token_indices"))
    module = saved.key.rpartition(".")[0]
    if isinstance(said, Mapping):
        tails = [name for name in said if module == name or module.endswith("." + name)]
        said = said[max(tails, key=len)] if tails else None
    if not isinstance(said, Sequence) or isinstance(said, str) or not all(_is_row(row) for row in said):
        raise MalformedFileError(
            f"adapter_config.json does not say which rows of {module} the adapter holds",
            path=adapter.path or None,
            keys=[saved.ref.name],
            expected="trainable_token_indices was expected to list them",
            todo="Give the adapter's folder, with the configuration it was saved with",
        )
    return tuple(said)


def _is_row(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_rows(
    adapter: Adapter, saved: Saved, places: tuple[int, ...], weight: Weight, height: int | None
) -> None:
    """Refuse rows that the tensor does not have; ``height`` is what the adapter resizes it to."""
    rows = height if height is not None else weight.shape[0]
    if (len(places), *weight.shape[1:]) == saved.ref.shape and max(places, default=0) < rows:
        return
    raise ShapeError(
        f"{len(places)} rows up to {max(places, default=0)} of {weight.key} are given as {list(saved.ref.shape)}; "
        f"the base's is {list(weight.shape)}",
        path=adapter.path or None,
        keys=[saved.ref.name],
        expected="One row for each token was expected, of the base's width and within its vocabulary",
        todo="Give the base model that the adapter was trained on",
    )


def _check_shape(adapter: Adapter, saved: Saved, weight: Weight, strength: float, base: Base) -> None:
    has, wanted = saved.ref.shape, weight.shape
    if has == wanted:
        return
    if len(has) != len(wanted) or has[1:] != wanted[1:] or not is_vocabulary(saved.key):
        raise ShapeError(
            f"{saved.key} is {list(has)} in the adapter and {list(wanted)} in {base.path}",
            path=adapter.path or None,
            keys=[saved.ref.name],
            expected="One shape was expected; only a vocabulary may have more or fewer rows",
            todo="Give the base model that the adapter was trained on",
        )
    if strength != 1:
        raise OptionError(
            f"{saved.key} has {has[0]} rows in the adapter and {wanted[0]} in {base.path}, and cannot be mixed",
            path=adapter.path or None,
            keys=[saved.ref.name],
            expected=f"A weight of 1 was expected, not {strength:g}",
            todo="Bake this adapter with a weight of 1",
        )
