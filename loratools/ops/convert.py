"""One adapter in another layout: names change, ΔW does not, and every tensor is accounted for."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from loratools import formats
from loratools.errors import LayoutError, LoraError, OptionError
from loratools.formats import Document, Format, _names
from loratools.formats._scaling import refuse_nonfinite
from loratools.io.base import Base
from loratools.model import EMPTY, Adapter, Module, Target
from loratools.ops import (
    _fit,
    _host,
    _initial,
    _ledger,
    _moe_convert,
    _moe_told,
    _normal,
    _normal_form,
    _normal_whole,
    _one_alpha,
    _prove,
    _regroup,
    _remarks,
    _reread,
    _row_orders,
    _settle,
    files,
)
from loratools.ops._prove import verify
from loratools.ops.results import Conversion, ConvertReport, LedgerEntry, WrittenTensor

if TYPE_CHECKING:
    from loratools.ops._probe import Probed

__all__ = ["Converted", "convert", "convert_file", "verify", "writable"]

Progress = Callable[[str, int, int], None]


class Converted(NamedTuple):
    """An adapter as a layout will write it.

    Attributes:
        adapter: What is left of the input, at the layout's grain.
        document: Its tensors under the layout's keys.
        ledger: Every tensor of the input.
        expected: The modules whose ΔW the result must have.
        rounded: By weight, the store dtype to which values were rounded.
        conversions: Modules that were turned into LoRA.
        notes: What the caller should know.
        host: What is known of the model that it is for.
        reordered: Whether the document has rows in another order than the modules.
        normal: What was done for a program's normal form.
        experts: What is known of the model's experts.
        renamed: The modules' paths by what a reader of the document calls them, where that is something else.
    """

    adapter: Adapter
    document: Document
    ledger: tuple[LedgerEntry, ...]
    expected: tuple[Module, ...]
    rounded: Mapping[tuple[str, str], str]
    conversions: tuple[Conversion, ...]
    notes: tuple[str, ...]
    host: _host.Host = _host.Host()
    reordered: bool = False
    normal: _normal_form.Normal = _normal_form.Normal()
    experts: _moe_told.About = _moe_told.About()
    renamed: Mapping[str, str] = EMPTY


def convert(
    adapter: Adapter,
    layout: str,
    *,
    dtype: str = "keep",
    fold: bool = False,
    as_kind: str | None = None,
    rank: int | None = None,
    base: files.PathLike | None = None,
    initial: files.PathLike | None = None,
    drop: Iterable[str] = (),
    device: str = "auto",
    container: str = "safetensors",
    heads: int | None = None,
    kv_heads: int | None = None,
    bucket: bool = False,
    full_weights: bool = False,
    experts: str = _moe_convert.KEEP,
    experts_count: int | None = None,
) -> Converted:
    """An adapter in another layout.

    Args:
        adapter: From ``load``.
        layout: The target ("kohya", "diffusers", "peft", "comfy", …), or a program whose normal form is wanted
            ("vllm", "sglang", "lorax", "llama.cpp"; MLX's layout is one by itself).
        dtype: "float32", "float16", "bfloat16", "float64", or "keep".
        fold: Fold the scale into the factors though the layout has a place for it.
        as_kind: "lora": turn every module into LoRA first.
        rank: Of those, a count; None: their full rank, which is exact. For a program: of all modules; higher ones are
            cut, lower ones padded with zeros.
        base: The base checkpoint: a file or a folder. Names that no architecture explains are matched against its
            own, and kinds whose ΔW depends on the base weight become LoRA with it.
        initial: The factors before training of an adapter whose initialisation has changed the base (PiSSA, OLoRA, …):
            they are subtracted, which makes a plain LoRA for the base as it was published.
        drop: What may be left out where the layout cannot hold it: "extras", "magnitude", "bias", "norm", a kind, a
            component, or "unnamed" for weights that the layout has no names for.
        device: Where modules are turned into LoRA: "auto", "cpu", "cuda", "cuda:N" or "mps".
        container: "safetensors", or "pickle" where the layout has such a form.
        heads: How many heads queries have, for layouts that order their rows by heads; default: as the base's
            configuration says.
        kv_heads: How many heads keys have; likewise.
        bucket: Whether to pad the rank to the next one that a program provides for.
        full_weights: Whether the result has whole tensors apart, for the caller to write, that a program cannot hold.
        experts: How modules of experts are written: "split" (one for each expert), "fused" (one for all of a layer), or
            "keep": as they are, unless the layout has but one way.
        experts_count: How many experts a layer has, a count; default: as names, shapes and configurations say.

    Raises:
        LayoutError: The layout cannot hold everything; the message names the keys, and what would drop them.
        LoraError: A module cannot be converted.
    """
    drop = frozenset([drop] if isinstance(drop, str) else drop)
    demand = _normal_form.demanded(layout, rank, bucket=bucket, apart=full_weights)
    form = writable(layout)
    if demand is not None:
        _normal.refuse_others(adapter, demand.runtime)
        form = _normal.restricted(form, demand.runtime)
    if dtype != "keep" and dtype not in files.STORE_DTYPES:
        raise OptionError(f"there is no store dtype {dtype!r}", candidates=[*files.STORE_DTYPES, "keep"])
    refuse_nonfinite(adapter)
    adapter = _initial.without(adapter, initial)
    goal = files.layout_of(form, container)
    host, known = _host.of(base, heads, kv_heads)
    ordered = _host.settled(adapter, form, host)
    reordered = not _row_orders.alike(ordered, form, host)
    if reordered:
        ordered = _row_orders.as_transformers(ordered, host)
    ordered, about = _moe_convert.told(ordered, base, experts_count)
    named, store = against(ordered, known), files.STORE_DTYPES.get(dtype, "")
    if demand is not None and as_kind is None:
        ready, origins, conversions = _normal.held(named, demand, known, drop, store, device)
    else:
        ready, origins, conversions = _as_kind(named, as_kind, rank, known, dtype, device)
    ready, components = _settle.apart(ready, form, goal, drop)
    regrouped = _regroup.regroup(ready, form)
    regrouped = _moe_convert.styled(regrouped, form, experts, about, open_up=demand is not None)
    if demand is not None:
        seen = _moe_convert.seen(ready, regrouped)
        regrouped = _normal_form.steps(regrouped, seen, demand, form, host, known, store)
    mixed = _names.mixed(ready.modules.values()) if form.uniform else frozenset()
    steps = _one_alpha.steps(regrouped.steps, store) if form.alpha == "file" else regrouped.steps
    steps = _moe_convert.packed(steps, form)
    whole = replace(ready, modules={step.module.target: step.module for step in steps})
    fitted = [
        _fit.fit(step, whole, goal, form, fold=fold, dtype=store, mixed=mixed, matched=known is not None)
        for step in steps
    ]
    fitted = _host.without_outputs(fitted, form, host)
    misfits = _settle.misfits_of(fitted, origins)
    extras, misfits, beside = _normal_form.beside(ready, fitted, misfits, goal, form, demand, known)
    asked = drop or fold or store or as_kind or base or initial or demand or experts != _moe_convert.KEEP
    if misfits and not asked and adapter.layout.name == goal.name and _is_spelt(adapter, fitted):
        return _as_it_is(adapter, form)
    modules = _modules(fitted, store)
    dropped = [*components, *misfits, *_remarks.untold(adapter, goal)]
    asked_for = goal if demand is None else goal._replace(name=demand.runtime.title)
    _settle.settle(dropped, drop, ready, asked_for, nothing=not modules)
    if not modules:
        raise LayoutError(
            "nothing is left to write", path=adapter.path or None, todo="Drop less, or choose another layout"
        )
    kept = _settle.without(replace(ready, modules=modules, order=()), extras)
    renamed = _reread.names(
        [target.path for target in modules], form, form.family(adapter, host.model_type) or ""
    )
    written = _row_orders.as_written(kept, form, host) if reordered else kept
    document = _normal_form.configured(formats.document(written, goal, form), form, demand, host, kept)
    notes = (*regrouped.notes, *_remarks.remarks(kept, form, dropped, drop), *_reread.notes(renamed, form))
    ledger = _ledger.account(adapter, ready, fitted, origins, dropped, written=document.tensors, form=form)
    provable = _prove.provable(origins, conversions)
    return Converted(
        kept,
        document,
        _normal_form.told(ledger, fitted, beside, demand),
        tuple(_prove.expected(fitted, provable, ready)),
        _prove.rounded(fitted, store, ready.arch, provable),
        tuple(conversions),
        tuple(dict.fromkeys((*ready.notes, *notes))),
        host,
        reordered,
        _normal_form.normal(demand, fitted, origins, conversions, beside),
        about,
        renamed,
    )


def _is_spelt(adapter: Adapter, fitted: Sequence[_fit.Fitted]) -> bool:
    """Whether all that can be spelt anew is spelt so in the file already."""
    names = set(adapter.order)
    return bool(names) and all(ref.name in names for each in fitted for ref in each.spelt)


def _as_it_is(adapter: Adapter, form: Format) -> Converted:
    """The adapter in its own layout, of which something can be read and kept, but not spelt anew."""
    ledger = tuple(LedgerEntry(key, "moved", (key,)) for key in adapter.order)
    document = formats.document(adapter, adapter.layout, form)
    modules = tuple(adapter.modules.values())
    return Converted(adapter, document, ledger, modules, {}, (), adapter.notes)


def writable(layout: str) -> Format:
    """The layout of this name, or that of a program with a normal form.

    Raises:
        LayoutError: There is none, or it is only read.
    """
    runtime = _normal.runtime_of(layout)
    form = formats.get(layout if runtime is None else runtime.layouts[0])
    if form.speller is None or form.finisher is None:
        raise LayoutError(
            f"the {form.title} layout can be read but not written yet",
            expected=f"Written are {', '.join(formats.writable())}",
            todo="Choose another with --to",
        )
    return form


def against(adapter: Adapter, base: Base | None) -> Adapter:
    """The adapter under the base's own names; its tensors keep the keys that they have in the file."""
    if base is None:
        return adapter
    from loratools.ops import base_names

    special, others = _moe_convert.apart(adapter)
    if not others.modules and special.modules:
        return adapter
    found = base_names.against(others, base)
    pairs = zip(found.modules.items(), others.modules.values(), strict=True)
    modules = {target: module._replace(factors=before.factors) for (target, module), before in pairs}
    return replace(found, modules={**modules, **special.modules})


def _as_kind(
    adapter: Adapter, kind: str | None, rank: int | None, base: Base | None, dtype: str, device: str
) -> tuple[Adapter, dict[Target, Module], list[Conversion]]:
    """The adapter with its modules turned into LoRA where that was asked for, and what they were before."""
    if kind is None:
        if rank is not None:
            raise OptionError("a rank is given, but no kind to convert to", todo="Add --as lora")
        return adapter, {}, []
    if kind != "lora":
        raise OptionError(f"modules cannot be turned into {kind!r}", candidates=["lora"])
    from loratools.ops import _as_kind

    store = files.STORE_DTYPES.get(dtype)
    return _as_kind.as_lora(adapter, rank=rank, base=base, dtype=store, device=device)


def _modules(fitted: Sequence[_fit.Fitted], store: str) -> dict[Target, Module]:
    found: dict[Target, Module] = {}
    for each in fitted:
        if each.module is not None:
            found[each.module.target] = files.cast_module(each.module, store) if store else each.module
    return found


def convert_file(
    path: files.PathLike,
    output: files.PathLike,
    *,
    to: str | None = None,
    arch: str | None = None,
    check: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    full_weights: files.PathLike | None = None,
    **options: Any,
) -> ConvertReport:
    """Load, convert, write, and prove that nothing changed.

    Args:
        path: The input.
        output: A file, or a folder where the layout wants one.
        to: The layout, or a program whose normal form is wanted; default: the layout it came in.
        arch: The input's architecture, overriding detection.
        check: Whether to compare ΔW · x of both files on random x before the output takes its name.
        overwrite: Whether an existing output may be replaced.
        dry_run: Do everything but write.
        progress: Called with a tensor's name, its number and the count of all.
        full_weights: Where to write whole tensors that the program cannot hold; nothing is, where there are none.
        options: As for ``convert``.

    Raises:
        LoraError: Nothing was written.
    """
    files.check_output(output, overwrite=overwrite)
    _refuse_base(options.get("base"), output)
    if full_weights is not None:
        _normal_whole.check(full_weights, output, overwrite=overwrite)
    adapter = files.load(path, arch=arch, embedded=True)
    asked = to or adapter.layout.name
    to = writable(asked).name
    container = files.check_name(output, to)
    apart = full_weights is not None
    adapter, converted = _untied(
        adapter, path, asked, {**options, "container": container, "full_weights": apart}
    )
    found: list[Probed] = []

    def prove(written: str) -> None:
        if check:
            found.append(
                _prove.compared(converted, files.load(written, arch=_forced(adapter), embedded=True))
            )
            # Only now: what an error holds on to would keep the file open, and Windows from removing it.
            _prove.refuse_changes(adapter, found[0])
        if full_weights is not None:
            _normal_whole.write(full_weights, converted.normal.whole, overwrite=overwrite)

    if dry_run:
        if check:
            found.append(verify(adapter, converted, _read_again(adapter, converted, container)))
        size = files.document_size(converted.document, formats.get(to))
    else:
        size = files.write(
            converted.document,
            formats.get(to),
            output,
            container=container,
            overwrite=overwrite,
            progress=_counted(progress, len(converted.document.tensors)),
            check=prove,
        )
    report = _report(adapter, converted, os.fspath(output), to, size, found[0] if found else None)
    wrote = full_weights is not None and converted.normal.whole
    return report._replace(full_weights=os.fspath(full_weights)) if full_weights and wrote else report


def _untied(
    adapter: Adapter, path: files.PathLike, to: str, options: Mapping[str, Any]
) -> tuple[Adapter, Converted]:
    """A conversion; of a file of one of several architectures, as any of them if the result is the same for all.

    Where a base is given, those that it is of are enough.

    Raises:
        LoraError: It cannot be converted, or the architecture has to be known for it.
    """
    try:
        return adapter, convert(adapter, to, **options)
    except LoraError as error:
        if not adapter.candidates:
            raise
        refused = error
    found: list[tuple[Adapter, Converted]] = []
    for name in adapter.candidates:
        one = files.load(path, arch=name, embedded=True)
        try:
            found.append((one, convert(one, to, **options)))
        except LoraError:
            if options.get("base") is None:
                raise refused from None
    spelt = {tuple(ref.name for ref in each.document.tensors) for _, each in found}
    if len(spelt) != 1:
        raise refused
    one, converted = found[0]
    note = f"the names fit {' and '.join(adapter.candidates)} alike, and so do those that were written"
    return one, converted._replace(notes=(*converted.notes, note))


def _refuse_base(base: files.PathLike | None, output: files.PathLike) -> None:
    """Refuse to write over the base model, or into its folder.

    Raises:
        OptionError: Whatever may be overwritten, that is not meant.
    """
    if base is None:
        return
    model, goal = os.path.realpath(base), os.path.realpath(output)
    if goal == model or (os.path.isdir(model) and goal.startswith(model + os.sep)):
        raise OptionError(
            "the output would be written over the base model",
            path=os.fspath(output),
            todo="Choose another name for the output",
        )


def _forced(adapter: Adapter) -> str:
    """The architecture to read an output with: a part of a file may not be enough to detect it again.

    Names that were unknown are compared as such, though with their dots back they may be some model's.
    """
    return adapter.arch


def _read_again(adapter: Adapter, converted: Converted, container: str) -> Adapter:
    """The document as a reader of it sees it."""
    tensors = {ref.name: ref for ref in converted.document.tensors}
    return formats.read(
        tensors,
        metadata=converted.document.metadata,
        config=converted.document.config or {},
        container=container,
        arch=_forced(adapter),
    )


def _counted(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    numbers = itertools.count(1)
    return lambda _: progress("", next(numbers), total)


def _report(
    adapter: Adapter, converted: Converted, output: str, to: str, size: int, probed: Probed | None
) -> ConvertReport:
    modules = converted.adapter.modules
    return ConvertReport(
        input=adapter.path,
        output=output,
        bytes=size,
        arch=adapter.arch,
        source=str(adapter.layout),
        layout=to,
        modules=(len(adapter.modules), len(modules)),
        kinds=converted.adapter.kinds,
        ranks=dict(sorted(Counter(module.rank or 0 for module in modules.values()).items())),
        dtypes=dict(Counter(ref.dtype for ref in converted.document.tensors)),
        ledger=converted.ledger,
        tensors=tuple(
            [WrittenTensor(ref.name, ref.dtype, ref.shape, ref.nbytes) for ref in converted.document.tensors]
        ),
        conversions=converted.conversions,
        weights=probed.weights if probed else None,
        error=probed.error if probed else None,
        worst=probed.worst if probed else "",
        notes=converted.notes,
        runtime=converted.normal.runtime,
        normalised=converted.normal.account,
    )
