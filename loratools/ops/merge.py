"""Several adapters into one: every method is applied to ΔW, module by module, in factor space where it allows it."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratools import formats, kinds, methods
from loratools.errors import LayoutError, LoraError, NonFiniteError, OptionError, UnsupportedKindError
from loratools.kinds import lora
from loratools.maths.lowrank import Factors
from loratools.model import Adapter, Layout, Module, Target
from loratools.ops import _merged, align, files
from loratools.ops.align import Contribution
from loratools.ops.results import MergedModule, MergeReport
from loratools.tensors import DTYPES, TensorRef, from_torch

Progress = Callable[[str, int, int], None]

# Broken or superseded spellings are not written anew: their layout's present one is.
_PRESENT = {("kohya", "malformed"): "", ("diffusers", "attn-procs"): "peft-keys", ("peft", "wrapped"): ""}


@dataclass(frozen=True, slots=True)
class Request:
    """Everything a merge was asked for, checked.

    Attributes:
        adapters: The inputs.
        weights: One per input.
        method: The merge method.
        options: Its options.
        layout: The layout of the result.
        arch: The inputs' common architecture.
        dtype: Store dtype (a key of ``DTYPES``), or None to keep the inputs'.
        device: Where to compute.
        allow_nonfinite: Whether NaN and Inf in factors are let through.
    """

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    method: methods.Method
    options: methods.Options
    layout: Layout
    arch: str
    dtype: str | None
    device: str
    allow_nonfinite: bool


def merge(
    adapters: Sequence[Adapter],
    *,
    weights: Sequence[float] | None = None,
    method: str = "linear",
    rank: int | None = None,
    layout: str | None = None,
    dtype: str = "keep",
    device: str = "auto",
    allow_nonfinite: bool = False,
    drop: Iterable[str] = (),
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Adapter, MergeReport]:
    """Combine adapters into one.

    Args:
        adapters: Of one architecture; rank, alpha, layout, dtype and modules may differ.
        weights: What each ΔW is multiplied by; default 1 each. A weight of 0 is absence.
        method: "linear", "concat", "ties", …
        rank: Of the result, a count; None: lossless where the method allows it.
        layout: Of the result; default as the first input came.
        dtype: "float32", "float16", "bfloat16", or "keep": the inputs' own, the wider where they differ.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        allow_nonfinite: Go on with NaN or Inf in a factor.
        drop: What may be left out: "extras", the tensors that belong to no module.
        progress: Called with the module's name, its number and the count of all.
        options: The method's own, by name (``density``, ``lam``, ``seed``).

    Returns:
        The merged adapter, in memory, and what was done.

    Raises:
        LoraError: The inputs cannot be merged; the message says which and why.
    """
    request = _request(adapters, weights, method, rank, layout, dtype, device, allow_nonfinite, options)
    extras, dropped = _merged.extras(request.adapters, request.layout.name, drop)
    targets = align.align(request.adapters, request.arch, formats.get(request.layout.name).dialect)
    _refuse(request, targets)
    modules: dict[Target, Module] = {}
    merged: list[MergedModule] = []
    kept = total = 0.0
    for number, (target, contributions) in enumerate(targets.items()):
        if progress is not None:
            progress(str(target), number, len(targets))
        module, energy, size = _combine(request, target, contributions)
        modules[target] = module
        sources = tuple(sorted({each.source for each in contributions}))
        merged.append(MergedModule(str(target), target.component, sources, module.rank or 0, energy))
        kept, total = kept + size * (1.0 if energy is None else energy), total + size
    notes = list(dict.fromkeys(note for adapter in request.adapters for note in adapter.notes))
    result = Adapter(
        modules=modules,
        extras=extras,
        metadata=_merged.metadata(request.adapters, request.weights, request.method.name),
        arch=request.arch,
        layout=request.layout,
        config=_merged.config(request.adapters, modules),
        notes=tuple(notes),
    )
    report = MergeReport(
        method=request.method.name,
        options=_shown_options(request),
        inputs=tuple(_merged.inputs(request.adapters, request.weights)),
        modules=tuple(merged),
        energy=kept / total if total else 1.0,
        layout=request.layout.name,
        arch=request.arch,
        dtypes=dict(Counter(ref.dtype for module in modules.values() for _, ref in module.tensors())),
        ranks=dict(sorted(Counter(module.rank or 0 for module in modules.values()).items())),
        carried=tuple(extras),
        dropped=dropped,
        notes=tuple(notes),
    )
    return result, report


def merge_files(
    paths: Sequence[files.PathLike], output: files.PathLike, *, overwrite: bool = False, **options: Any
) -> MergeReport:
    """Load, merge and write; the same options as ``merge``, and ``arch``.

    Raises:
        LoraError: Nothing was written.
    """
    arch = options.pop("arch", None)
    dry_run = options.pop("dry_run", False)
    _refuse_output(Path(output), overwrite)
    adapters = [files.load(path, arch=arch) for path in paths]
    merged, report = merge(adapters, **options)
    if dry_run:
        form = formats.get(merged.layout.name)
        document = formats.document(merged, merged.layout, form)
        size = sum(ref.nbytes for ref in document.tensors)
        return report._replace(output=os.fspath(output), bytes=size)
    written = files.save(merged, output, overwrite=overwrite)
    return report._replace(output=os.fspath(output), bytes=written)


def _refuse_output(output: Path, overwrite: bool) -> None:
    """An existing output is refused before any work is done."""
    if output.exists() and not overwrite and not (output.is_dir() and not any(output.iterdir())):
        from loratools.errors import OutputExistsError

        raise OutputExistsError(
            "the output exists already", path=output, todo="Pass --overwrite to replace it"
        )


def _request(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    method: str,
    rank: int | None,
    layout: str | None,
    dtype: str,
    device: str,
    allow_nonfinite: bool,
    options: Mapping[str, Any],
) -> Request:
    if not adapters:
        raise OptionError("there is nothing to merge", expected="At least one adapter was expected")
    given = tuple(float(weight) for weight in weights) if weights is not None else (1.0,) * len(adapters)
    if len(given) != len(adapters):
        raise OptionError(
            f"{len(given)} weights for {len(adapters)} inputs",
            expected="One weight for each input was expected",
        )
    bad = [str(weight) for weight in given if weight != weight or abs(weight) == float("inf")]
    if bad:
        raise OptionError("a weight is not a finite number", keys=bad)
    if dtype != "keep" and dtype not in files.STORE_DTYPES:
        raise OptionError(f"there is no store dtype {dtype!r}", candidates=[*files.STORE_DTYPES, "keep"])
    chosen = _method(method)
    return Request(
        adapters=tuple(adapters),
        weights=given,
        method=chosen,
        options=_options(chosen, rank, options),
        layout=_layout(adapters[0], layout),
        arch=align.common_arch(adapters),
        dtype=None if dtype == "keep" else files.STORE_DTYPES[dtype],
        device=_device(device),
        allow_nonfinite=allow_nonfinite,
    )


def _method(name: str) -> methods.Method:
    known = methods.methods()
    if name not in known:
        raise OptionError(
            f"there is no merge method {name!r}",
            candidates=difflib.get_close_matches(name, known),
            expected=f"Known are {', '.join(known)}",
        )
    return known[name]


def _options(method: methods.Method, rank: int | None, given: Mapping[str, Any]) -> methods.Options:
    fields = {option.field: option.name for option in method.options}
    foreign = [name for name in given if name not in fields]
    if foreign:
        raise OptionError(
            f"{method.name} has no option {foreign[0]!r}",
            expected=f"Its options are {', '.join(fields.values())}",
        )
    options = methods.Options(rank=rank, **given)
    method.check(options)
    return options


def _layout(first: Adapter, name: str | None) -> Layout:
    wanted = name or first.layout.name
    form = formats.get(wanted)
    if form.speller is None:
        raise LayoutError(
            f"the {form.title} layout can be read but not written yet",
            candidates=formats.writable(),
            todo="Choose another with --to",
        )
    if wanted != first.layout.name:
        return Layout(wanted, "peft-keys" if wanted == "diffusers" else "")
    variant = _PRESENT.get((wanted, first.layout.variant), first.layout.variant)
    return Layout(wanted, variant)


def _device(name: str) -> str:
    if name != "auto":
        with contextlib.suppress(RuntimeError):
            torch.empty(0, device=name)
            return name
        raise OptionError(f"the device {name!r} cannot be used here", candidates=["auto", "cpu"])
    # The core problems are small; moving factors to a GPU and back costs more than it saves.
    return "cpu"


def _refuse(request: Request, targets: Mapping[Target, Sequence[Contribution]]) -> None:
    """Everything that cannot be merged, named at once, before any work is done."""
    if not targets:
        raise OptionError("the inputs have no modules")
    modules = [(adapter, module) for adapter in request.adapters for module in adapter.modules.values()]
    other = [
        (adapter, module)
        for adapter, module in modules
        if not kinds.get(module.kind).low_rank or "diff" in module.factors
    ]
    if other:
        titles = sorted({_title(module) for _, module in other})
        raise UnsupportedKindError(
            f"{len(other)} modules are {' and '.join(titles)}, which cannot be merged yet",
            path=other[0][0].path or None,
            keys=[str(module.target) for _, module in other],
            expected="Only LoRA and LoCon modules can be merged",
        )
    doras = [(adapter, module) for adapter, module in modules if module.magnitude is not None]
    if doras:
        raise UnsupportedKindError(
            f"{len(doras)} modules are DoRA: their ΔW depends on the base weights, which merging does not have",
            path=doras[0][0].path or None,
            keys=[str(module.target) for _, module in doras],
            todo="Bake them into the base model one by one instead",
        )
    if not request.allow_nonfinite:
        _refuse_nonfinite(modules)


def _title(module: Module) -> str:
    return kinds.get("full" if "diff" in module.factors else module.kind).title


def _refuse_nonfinite(modules: Iterable[tuple[Adapter, Module]]) -> None:
    bad: list[str] = []
    where = ""
    for adapter, module in modules:
        for _, ref in module.tensors():
            if DTYPES[ref.dtype].floating and not _finite(ref):
                bad.append(ref.name)
                where = where or adapter.path
    if bad:
        raise NonFiniteError(
            f"{len(bad)} tensors hold NaN or Inf",
            path=where or None,
            keys=bad,
            todo="Pass --allow-nonfinite to go on all the same",
        )


def _finite(ref: TensorRef) -> bool:
    tensor = ref.load()
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensor = tensor.float()
    # A sum is NaN or Inf if any term is; only then is each looked at.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float64))) or bool(torch.isfinite(tensor).all())


def _combine(
    request: Request, target: Target, contributions: Sequence[Contribution]
) -> tuple[Module, float | None, float]:
    """The merged module, the energy retained, and ‖ΔW‖² of the result."""
    active = [each for each in contributions if request.weights[each.source] != 0.0] or list(
        contributions[:1]
    )
    if len(active) == 1 and _carries(request, active[0]):
        module = active[0].module
        return _renamed(module, request, target), None, _energy_of(_factors(active[0], request.device))
    parts = [methods.Part(_factors(each, request.device), request.weights[each.source]) for each in active]
    try:
        outcome = request.method.combine(parts, request.options)
    except LoraError:
        raise
    except (RuntimeError, ValueError) as error:
        raise NonFiniteError(
            f"{target}: {request.method.name} failed: {error}",
            todo="Look at the inputs with `loratools info`",
        ) from error
    module = _module(request, target, active, outcome.factors)
    return module, outcome.energy, _energy_of(outcome.factors)


def _carries(request: Request, each: Contribution) -> bool:
    """Whether a module goes over as it is: alone, whole, at weight 1, and nothing asks for a change."""
    same = each.whole and request.weights[each.source] == 1.0
    plain = request.method.lossless and request.options.rank is None
    return same and plain and request.dtype is None


def _renamed(module: Module, request: Request, target: Target) -> Module:
    """A carried module; keys of another layout are forgotten."""
    owner = next(adapter for adapter in request.adapters if adapter.modules.get(target) is module)
    if owner.layout.name == request.layout.name and owner.layout.variant == request.layout.variant:
        return module
    factors = {role: _settled(ref).renamed("") for role, ref in module.factors.items()}
    return replace(module, factors=factors, alpha_tensor=None)


def _settled(ref: TensorRef) -> TensorRef:
    """A tensor that lies as its shape says."""
    return from_torch(ref.name, ref.load().contiguous()) if ref.transposed else ref


def _factors(each: Contribution, device: str) -> Factors:
    up, down = lora.matrices(each.module)
    return Factors((each.place(up) * each.module.scale).to(device), down.to(device))


def _energy_of(factors: Factors) -> float:
    gram = (factors.up.T @ factors.up) * (factors.down @ factors.down.T)
    return max(0.0, float(gram.sum()))


def _module(request: Request, target: Target, active: Sequence[Contribution], factors: Factors) -> Module:
    first = active[0].module
    dtype = request.dtype or _store_dtype([each.module for each in active])
    shape = (factors.up.shape[0], *(first.shape or ())[1:])
    up, down = factors.up, factors.down
    if len(shape) > 2:
        up = up.reshape(*up.shape, *(1 for _ in shape[2:]))
        down = down.reshape(-1, *shape[1:])
    stored = {"up": _store(up, dtype, target), "down": _store(down, dtype, target)}
    for role in ("up_bias", "diff_b"):
        bias = _bias(request, active, role)
        if bias is not None:
            stored[role] = _store(bias, dtype, target)
    rank = int(factors.up.shape[1])
    return Module(
        target=target,
        kind="lora",
        factors=stored,
        scale=1.0,
        alpha=float(rank),
        rank=rank,
        shape=shape,
        op=first.op,
        in_first=first.in_first,
    )


def _bias(request: Request, active: Sequence[Contribution], role: str) -> torch.Tensor | None:
    """What the inputs add to the layer's bias: PEFT's lora_bias with the scale, a full difference without."""
    total: torch.Tensor | None = None
    for each in active:
        ref = each.module.factors.get(role)
        if ref is not None:
            scale = each.module.scale if role == "up_bias" else 1.0
            bias = each.place(ref.load().to(torch.float64)) * scale * request.weights[each.source]
            total = bias if total is None else total + bias
    return total


def _store_dtype(modules: Sequence[Module]) -> str:
    found = {module.factors[role].dtype for module in modules for role in ("up", "down")}
    if len(found) == 1:
        only = found.pop()
        return only if DTYPES[only].bits >= 16 else "F16"
    if "F64" in found:
        return "F64"
    return "F16" if found <= {"F16", "F8_E4M3", "F8_E5M2"} else "F32"


def _store(tensor: torch.Tensor, dtype: str, target: Target) -> TensorRef:
    after = tensor.to("cpu", getattr(torch, DTYPES[dtype].torch)).contiguous()
    if not torch.isfinite(after).all() and torch.isfinite(tensor).all():
        raise NonFiniteError(
            f"{target}: merged values up to {tensor.abs().max().item():.3g} do not fit {dtype}",
            todo="Choose --dtype float32 or bfloat16",
        )
    return from_torch("", after)


def _shown_options(request: Request) -> dict[str, Any]:
    shown = {option.name: getattr(request.options, option.field) for option in request.method.options}
    return {"rank": request.options.rank, **shown}
