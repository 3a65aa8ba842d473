"""PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA as plain LoRA for the base as it was published.

These initialisations take part of the base weight into the factors: training begins with W = R + s·B₀·A₀ and ends with
R + s·B·A, so that the change of the published W is s·(B·A - B₀·A₀) = s·[B, -B₀]·[A; A₀]: exact, at the summed rank.
PEFT does the same where ``save_pretrained`` is given ``path_initial_model_for_weight_conversion``; it refuses rsLoRA
with patterns, whose scale it could not state. Papers: PiSSA (arXiv 2404.02948), OLoRA (2406.01775), CorDA (2406.05223),
LoftQ (2310.08659), LoRA-GA (2407.05000).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratools.errors import OptionError, ShapeError, UnsupportedKindError
from loratools.formats import _carried, _peft_special
from loratools.io import storage
from loratools.kinds import lora
from loratools.model import Adapter, Module, Target
from loratools.ops import files
from loratools.tensors import DTYPES, LazySource, TensorRef

if TYPE_CHECKING:
    import torch

# What a configuration says of such a start, and what it says without one.
_BEGUN: dict[str, Any] = {
    "init_lora_weights": True,
    "loftq_config": {},
    "corda_config": None,
    "lora_ga_config": None,
}
# How the folder of initial factors is called in PEFT's examples, behind the method's name.
_FOLDER = "_init"
_TODO = "Give the folder that was saved right after the initialisation, before the first step"


def beside(adapter: Adapter) -> str:
    """The folder of initial factors in an adapter's own folder or next to it, by the names in PEFT's examples.

    Returns:
        Its path; empty where there is none, or where the adapter is for the base as it was published.
    """
    method = _method(adapter)
    if not method or not adapter.path:
        return ""
    own = os.path.dirname(adapter.path)
    above = os.path.dirname(own) if storage.is_url(own) else os.path.join(own, os.pardir)
    for folder in (own, above):
        found = os.path.join(folder, method + _FOLDER)
        found = found if storage.is_url(found) else os.path.normpath(found)
        if storage.is_dir(found) and not storage.same(found, own or os.curdir):
            return found
    return ""


def _method(adapter: Adapter) -> str:
    return next(filter(None, map(_peft_special.mutating, _carried.configs(adapter).values())), "")


def notes(adapter: Adapter) -> tuple[str, ...]:
    """Where the initial factors lie, for a reader who needs them."""
    found = beside(adapter)
    if not found:
        return ()
    return (
        f"the initial factors seem to lie in {found}: `loratools convert IN -o OUT --initial {found}` makes a plain "
        "LoRA of it",
    )


def without(adapter: Adapter, initial: files.PathLike | None) -> Adapter:
    """The adapter without its initial factors, where these are given; else as it is, with a note on where they lie.

    Args:
        adapter: As it was trained.
        initial: The file or folder of the factors before training, or None.

    Raises:
        LoraError: As for :func:`subtracted`, or the initial factors cannot be read.
    """
    if initial is None:
        return replace(adapter, notes=(*adapter.notes, *notes(adapter)))
    arch = adapter.arch if adapter.arch != "unknown" else None
    return subtracted(adapter, files.load(initial, arch=arch))


def subtracted(adapter: Adapter, initial: Adapter) -> Adapter:
    """A plain LoRA for the published base, from factors that are only valid on a base without their beginnings.

    Args:
        adapter: As it was trained.
        initial: Its factors before training.

    Returns:
        The adapter with modules of the summed rank. Modules that began at zero stay as they are, and so does what lies
        beside the factors: a bias is no part of the base, and DoRA's magnitude belongs to the same W + ΔW.

    Raises:
        OptionError: The initial factors are those of other modules, or the trained ones themselves.
        ShapeError: They are of other weights or of another scale.
        UnsupportedKindError: A module is of a kind whose factors cannot be stacked.
    """
    _refuse_strangers(adapter, initial)
    modules: dict[Target, Module] = {}
    untrained = 0
    for target, module in adapter.modules.items():
        first = initial.modules[target]
        untrained += _is_same(module, first)
        modules[target] = module if _is_zero(first) else _stacked(module, first, initial.path)
    if untrained == len(modules):
        raise OptionError(
            "the initial factors are the adapter's own: nothing would be left of it",
            path=initial.path or None,
            expected="The factors before training were expected, which differ from the trained ones",
            todo=_TODO,
        )
    kept = tuple(said for said in adapter.notes if said != _peft_special.changed_base(adapter.config))
    return replace(
        adapter,
        modules=modules,
        config=_begun(adapter.config),
        metadata=_passed_on(adapter.metadata),
        notes=(*kept, *_remarks(adapter, initial)),
    )


def _begun(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of an adapter that began at zero."""
    return {**config, **{key: value for key, value in _BEGUN.items() if key in config}}


def _passed_on(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """The metadata with the same in the configurations that another layout has left there."""
    if _carried.CONFIGS not in metadata:
        return metadata
    found = {name: _begun(config) for name, config in _carried.parsed(metadata[_carried.CONFIGS]).items()}
    return {**metadata, _carried.CONFIGS: json.dumps(found, sort_keys=True)}


def _refuse_strangers(adapter: Adapter, initial: Adapter) -> None:
    lacking = [str(target) for target in adapter.modules if target not in initial.modules]
    more = [str(target) for target in initial.modules if target not in adapter.modules]
    if lacking or more:
        what = f"{len(lacking)} of the adapter's {len(adapter.modules)} modules are not among the initial factors"
        if not lacking:
            what = f"{len(more)} of {len(initial.modules)} initial modules are not in the adapter"
        raise OptionError(
            what,
            path=initial.path or None,
            keys=lacking or more,
            expected="The same modules were expected, before and after training",
            todo=_TODO,
        )


def _remarks(adapter: Adapter, initial: Adapter) -> Iterable[str]:
    method = _method(adapter)
    said = f"init_lora_weights is {method}" if method else "the configuration names no initialisation"
    yield f"{said}: the initial factors of {initial.path or 'memory'} were subtracted, for the base as it was published"
    if method == "loftq":
        yield "LoftQ begins with a quantised base: what quantisation lost beyond the factors is not in ΔW"


def _is_zero(module: Module) -> bool:
    """Whether ΔW was zero before training, as with PEFT's usual start."""
    return any(not module.factors[role].load().any() for role in ("up", "down") if role in module.factors)


def _is_same(module: Module, first: Module) -> bool:
    return all(
        role in first.factors and first.factors[role].shape == ref.shape and _equal(ref, first.factors[role])
        for role, ref in module.factors.items()
    )


def _equal(one: TensorRef, other: TensorRef) -> bool:
    import torch

    return torch.equal(one.load().double(), other.load().double())


def _stacked(module: Module, first: Module, path: str) -> Module:
    """[B, -B₀] and [A; A₀] of a module, at its own scale."""
    if not _is_plain(module) or not _is_plain(first):
        odd = module if not _is_plain(module) else first
        raise UnsupportedKindError(
            f"{module.target}: initial factors cannot be subtracted from a module of kind {odd.kind}",
            path=path or None,
            keys=[ref.name for ref in odd.factors.values()],
            expected="Two factors were expected, up and down",
        )
    _refuse_other(module, first, path)
    up, down = module.factors["up"], module.factors["down"]
    factors = {
        **module.factors,
        "up": _joined(up, first.factors["up"], 1, negated=True),
        "down": _joined(down, first.factors["down"], 0, negated=False),
    }
    rank = (module.rank or 0) + (first.rank or 0)
    return module._replace(factors=factors, rank=rank, alpha=None, alpha_tensor=None)


def _is_plain(module: Module) -> bool:
    return lora.is_product(module._replace(magnitude=None)) and "mid" not in module.factors


def _refuse_other(module: Module, first: Module, path: str) -> None:
    if module.shape != first.shape:
        raise ShapeError(
            f"{module.target}: the initial factors are for a weight of shape {list(first.shape or ())}, the adapter's "
            f"for {list(module.shape or ())}",
            path=path or None,
            keys=[ref.name for ref in first.factors.values()],
            expected="The factors of the same weight were expected, before and after training",
            todo=_TODO,
        )
    if not math.isclose(module.scale, first.scale, rel_tol=1e-9):
        raise ShapeError(
            f"{module.target}: the initial factors are scaled by {first.scale:g}, the adapter's by {module.scale:g}",
            path=path or None,
            keys=[ref.name for ref in first.factors.values()],
            expected="The same r, lora_alpha and use_rslora were expected in both adapter_config.json",
            todo="Copy adapter_config.json of the training beside the initial factors, if they are its own",
        )


def _joined(one: TensorRef, other: TensorRef, axis: int, *, negated: bool) -> TensorRef:
    """Two tensors along an axis, the second with its sign changed; computed when asked for, in the wider dtype."""
    dtype = _wider(one.dtype, other.dtype)
    shape = (*one.shape[:axis], one.shape[axis] + other.shape[axis], *one.shape[axis + 1 :])

    def load() -> torch.Tensor:
        import torch

        kind = getattr(torch, DTYPES[dtype].torch)
        second = other.load().to(kind)
        return torch.cat([one.load().to(kind), -second if negated else second], dim=axis).contiguous()

    return TensorRef(one.name, shape, dtype, LazySource(load))


def _wider(one: str, other: str) -> str:
    """A dtype that holds both without rounding."""
    if one == other:
        return one
    wide = max(one, other, key=lambda name: DTYPES[name].bits)
    return wide if DTYPES[one].bits != DTYPES[other].bits else "F32"
