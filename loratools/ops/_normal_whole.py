"""Whole tensors beside the factors: what programs that apply factors alone cannot load, written apart for the base.

They are modules and biases that were trained whole, rows of embeddings, and the biases of ``lora_B``: each becomes the
tensor that the base then has, under the base's own name. What the base holds alike is not written at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from loratools import io
from loratools.errors import OptionError
from loratools.io.base import Base, Weight
from loratools.model import Adapter
from loratools.ops import _replaced, _scale
from loratools.ops._bits import same_bits
from loratools.ops._fit import Fitted, Misfit
from loratools.ops._outputs import PathLike, check_output, within
from loratools.ops._replaced import Saved
from loratools.ops.results import LedgerEntry
from loratools.tensors import LazySource, TensorRef

if TYPE_CHECKING:
    import torch

_SUFFIX = ".safetensors"
_TODO = "Write whole tensors apart with --full-weights FILE"
_NEEDS_BASE = "Give the model that the adapter is for with --base"


class Beside(NamedTuple):
    """What lies beside the factors.

    Attributes:
        whole: Tensors to write apart, by the base's keys.
        entries: What became of tensors of the input, by their keys.
        misfits: What has no place, neither in the program nor apart.
    """

    whole: Mapping[str, TensorRef]
    entries: Mapping[str, LedgerEntry]
    misfits: tuple[Misfit, ...]


def of_extras(adapter: Adapter, base: Base | None, *, apart: bool, title: str) -> Beside:
    """What becomes of an adapter's tensors that belong to no module.

    Args:
        adapter: Of any layout; only PEFT's has tensors that mean something to a model.
        base: The base model, or None.
        apart: Whether whole tensors are written apart.
        title: What the program is called, for messages.
    """
    whole: dict[str, TensorRef] = {}
    entries: dict[str, LedgerEntry] = {}
    misfits: list[Misfit] = []
    peft = adapter.layout.name == "peft" or "peft_type" in adapter.config
    saved = {each.ref.name: each for each in (_replaced.kept_whole(adapter) if peft else ())}
    for key in adapter.extras:
        each = saved.get(key)
        known = _weight(each, base) if each is not None else None
        if each is not None and each.role == "base" and known is not None and _is_same(each.ref, known):
            entries[key] = LedgerEntry(key, "implied", (), "the base holds it")
            continue
        made = _made(adapter, each, known) if each is not None and apart else None
        if made is None:
            misfits.append(_misfit(key, each, title, given=base is not None, apart=apart))
        else:
            whole[made.name] = made
            entries[key] = LedgerEntry(key, "apart", (made.name,), "a whole tensor")
    return Beside(whole, entries, tuple(misfits))


def of_biases(
    fitted: Sequence[Fitted], base: Base | None, misfits: Sequence[Misfit], *, apart: bool
) -> Beside:
    """What becomes of the biases of ``lora_B``: with the base's own, they are whole ones.

    Args:
        fitted: What is written, and what was left out.
        base: The base model, or None.
        misfits: What has no place so far; biases among them leave.
        apart: Whether whole tensors are written apart.
    """
    whole: dict[str, TensorRef] = {}
    entries: dict[str, LedgerEntry] = {}
    for each in fitted if apart and base is not None else ():
        module = each.step.sources[0]
        ref = module.factors.get("up_bias")
        known = _found(f"{module.target.path}.bias", base)
        if ref is not None and known is not None and known.shape == ref.shape:
            key = known.key
            whole[key] = _summed(known, _scale.times(ref, module.scale)).renamed(key)
            entries[ref.name] = LedgerEntry(ref.name, "apart", (key,), "added to the base's bias")
    left = []
    for misfit in misfits:
        keys = tuple(key for key in misfit.keys if key not in entries)
        if misfit.tag == "bias" and not misfit.todo:
            misfit = misfit._replace(todo=_TODO + " --base BASE" if not apart else _NEEDS_BASE)
        if keys:
            left.append(misfit._replace(keys=keys))
    return Beside(whole, entries, tuple(left))


def _misfit(key: str, saved: Saved | None, title: str, *, given: bool, apart: bool) -> Misfit:
    reason = f"{title} has no place for tensors that belong to no module"
    todo = "" if saved is None or apart else _TODO
    if saved is not None and not given and (saved.role == "base" or apart):
        todo = _NEEDS_BASE
    return Misfit("extras", (key,), reason, todo)


def _made(adapter: Adapter, saved: Saved, known: Weight | None) -> TensorRef | None:
    """The base's tensor as the adapter has it; None where the base would have to be there to tell."""
    if saved.role != "rows":
        return saved.ref.renamed(known.key if known is not None else saved.key)
    if known is None:
        return None
    places = _replaced.rows_of(adapter, saved)

    def load() -> torch.Tensor:
        import torch

        values = _load(known).clone()
        values[torch.tensor(places)] = saved.ref.load().to(values.dtype)
        return values

    return TensorRef(known.key, known.shape, known.dtype, LazySource(load))


def _summed(weight: Weight, change: TensorRef) -> TensorRef:
    """A bias of the base with a change added, rounded once to the base's dtype."""

    def load() -> torch.Tensor:
        values = _load(weight)
        return (values.double() + change.load().double()).to(values.dtype)

    return TensorRef(weight.key, weight.shape, weight.dtype, LazySource(load))


def _weight(saved: Saved, base: Base | None) -> Weight | None:
    return next((found for key in _replaced.wrapped(saved.key) if (found := _found(key, base))), None)


def _found(key: str, base: Base | None) -> Weight | None:
    """A tensor of the base, in whichever part it is."""
    parts = base.parts.values() if base is not None else ()
    return next((part[key] for part in parts if key in part), None)


def _ref(weight: Weight) -> TensorRef:
    def load() -> torch.Tensor:
        return _load(weight)

    return TensorRef(weight.key, weight.shape, weight.dtype, LazySource(load))


def _load(weight: Weight) -> torch.Tensor:
    with io.open_tensors(weight.file) as opened:
        values: torch.Tensor = opened.tensors[weight.key].load().clone()
    return values


def _is_same(ref: TensorRef, weight: Weight) -> bool:
    """Whether a tensor has the very values that the base has."""
    if (ref.shape, ref.dtype) != (weight.shape, weight.dtype):
        return False
    return same_bits(ref, _ref(weight))


def check(path: PathLike, output: PathLike, *, overwrite: bool) -> None:
    """Refuse a file for whole tensors that could not be written, before any work is done.

    Raises:
        OptionError: It is the output, or in it, or has no safetensors file's name.
        LoraError: As for any output.
    """
    if within(path, output) or not os.path.realpath(path).endswith(_SUFFIX):
        raise OptionError(
            "whole tensors cannot be written there",
            path=os.fspath(path),
            expected=f"A file of its own beside the output was expected, whose name ends in {_SUFFIX}",
            todo="Choose another name for --full-weights",
        )
    check_output(path, overwrite=overwrite)


def write(path: PathLike, whole: Mapping[str, TensorRef], *, overwrite: bool) -> None:
    """Write whole tensors to a file of their own; nothing where there are none.

    Raises:
        LoraError: Nothing was written.
    """
    if whole:
        tensors = tuple(ref for _, ref in sorted(whole.items()))
        io.write_safetensors(path, tensors, {"format": "pt"}, overwrite=overwrite)
