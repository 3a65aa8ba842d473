"""What PEFT's configuration says of tensors beside the factors, and the names it finds them by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loratools.errors import LayoutError
from loratools.formats._group import clean
from loratools.model import Adapter
from loratools.ops import _replaced
from loratools.ops._merge_steps import shown_name
from loratools.ops._replaced import Saved
from loratools.tensors import TensorRef

Held = Mapping[tuple[str, str], Sequence[tuple[int, Saved]]]

_WRAPPER = "base_layer."
_TYING = "ensure_weight_tying"
_ROWS = "trainable_token_indices"


def named(saved: Saved, adapted: set[str], *, is_bias: bool) -> str:
    """The key of a tensor in the result: the bias of an adapted module lies in PEFT's wrapper, others do not.

    Args:
        saved: The tensor as an input has it.
        adapted: The paths of all modules that the result adapts.
        is_bias: Whether it is a bias by itself.
    """
    name = saved.ref.name
    if not is_bias:
        return name
    stem = name.removesuffix("bias").removesuffix(_WRAPPER)
    return f"{stem}{_WRAPPER if clean(stem.rstrip('.')) in adapted else ''}bias"


def fields(
    adapters: Sequence[Adapter],
    extras: Mapping[str, TensorRef],
    held: Held,
    places: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """The fields of adapter_config.json that say what lies beside the factors.

    Args:
        adapters: The inputs.
        extras: What the result holds.
        held: What the inputs hold.
        places: The rows of the result's vocabularies that are given by themselves, by key.
    """
    if not extras:
        return {}
    kinds = {adapter.config.get("bias") for adapter in adapters} - {None, "none"}
    found: dict[str, Any] = {"bias": ("all" if "all" in kinds else kinds.pop()) if kinds else "none"}
    modules = [name for adapter in adapters for name in _listed(adapter.config.get("modules_to_save"))]
    found["modules_to_save"] = list(dict.fromkeys(modules)) or None
    if any(adapter.config.get(_TYING) for adapter in adapters):
        found[_TYING] = _tied(adapters, held)
    if places or any(adapter.config.get(_ROWS) for adapter in adapters):
        found[_ROWS] = _rows(adapters, held, places) if places else None
    return found


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _rows(
    adapters: Sequence[Adapter], held: Held, places: Mapping[str, tuple[int, ...]]
) -> list[int] | dict[str, list[int]]:
    """Rows as the inputs state them: one list for the input embedding, or lists by the modules' names."""
    stated = [adapters[at].config.get(_ROWS) for key in places for at, _ in held[key, "rows"]]
    if len(places) == 1 and all(isinstance(each, list) for each in stated):
        return list(next(iter(places.values())))
    names = [name for each in stated if isinstance(each, Mapping) for name in each]
    return {_called(key.rpartition(".")[0], names): list(own) for key, own in places.items()}


def _called(module: str, names: Iterable[str]) -> str:
    fitting = [name for name in names if module == name or module.endswith("." + name)]
    return max(fitting, key=len, default=module.rpartition(".")[2])


def _tied(adapters: Sequence[Adapter], held: Held) -> bool:
    """Whether what the result holds of the vocabulary is meant for both uses of a tied embedding.

    Raises:
        LayoutError: It is in one input and is not in another.
    """
    owners = {at for (key, _), found in held.items() if _replaced.is_vocabulary(key) for at, _ in found}
    owners |= {
        at
        for at, adapter in enumerate(adapters)
        if any(_replaced.is_vocabulary(target.path + ".weight") for target in adapter.modules)
    }
    said = {at: bool(adapters[at].config.get(_TYING)) for at in sorted(owners)}
    if len({*said.values()}) > 1:
        raise LayoutError(
            f"{_TYING} is true for some inputs and false for others, and both change the vocabulary",
            keys=[f"{shown_name(adapters[at].path) or 'an input'}: {value}" for at, value in said.items()],
            expected="One meaning for what is done to the embedding was expected",
            todo="Bake them into the base, where each keeps its own",
        )
    return any(said.values())


def refuse_conflicts(adapters: Sequence[Adapter], held: Held) -> None:
    """Refuse what one adapter cannot have together: a module both saved and adapted, or in full and in rows.

    Raises:
        LayoutError: Inputs have it so.
    """
    clashes: list[str] = []
    paths = [{target.path for target in adapter.modules} for adapter in adapters]
    for (key, role), found in held.items():
        module, _, leaf = key.rpartition(".")
        own = {at for at, _ in found}
        if leaf != "bias" and role != "base":
            clashes += [
                f"{module}: saved by {_name(adapters, min(own))}, adapted by {_name(adapters, at)}"
                for at, adapted in enumerate(paths)
                if at not in own and module in adapted
            ]
        whole = {at for at, _ in held.get((key, "replace"), ())}
        if role == "rows" and whole - own:
            clashes.append(
                f"{module}: saved by {_name(adapters, min(whole))}, in rows by {_name(adapters, min(own))}"
            )
    if clashes:
        raise LayoutError(
            f"{len(clashes)} modules are saved in full by one input and changed otherwise by another",
            keys=clashes,
            expected="An adapter has a module in one way only",
            todo="Bake them into the base model, or leave the saved modules out with --drop extras",
        )


def _name(adapters: Sequence[Adapter], position: int) -> str:
    return shown_name(adapters[position].path) or f"input {position + 1}"
