"""One adapter in another layout: names change, ΔW does not, and every tensor is accounted for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from loratools import formats
from loratools.errors import LayoutError, LoraError, OptionError
from loratools.formats import Document, Format
from loratools.formats._scaling import refuse_nonfinite
from loratools.io import unchanged
from loratools.io.uploading import uploads
from loratools.model import EMPTY, Adapter, Module
from loratools.ops import (
    _convert_report,
    _convert_stages,
    _host,
    _initial,
    _ledger,
    _moe_convert,
    _moe_told,
    _normal_config,
    _normal_form,
    _normal_whole,
    _prove,
    _remarks,
    _reread,
    _row_orders,
    _settle,
    files,
)
from loratools.ops._convert_report import Progress
from loratools.ops._convert_stages import Asked, Fitting, Ready, against, writable
from loratools.ops._fit import Fitted, Misfit
from loratools.ops._prove import verify
from loratools.ops.results import Conversion, ConvertReport, LedgerEntry

if TYPE_CHECKING:
    from loratools.ops._probe import Probed

__all__ = ["Converted", "against", "convert", "convert_file", "verify", "writable"]


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
    asked = _convert_stages.asked(
        adapter,
        layout,
        drop=drop,
        dtype=dtype,
        rank=rank,
        container=container,
        heads=(heads, kv_heads),
        base=base,
        bucket=bucket,
        full_weights=full_weights,
        fold=fold,
        as_kind=as_kind,
        device=device,
        experts=experts,
        experts_count=experts_count,
    )
    refuse_nonfinite(adapter)
    adapter = _initial.without(adapter, initial)
    ready = _convert_stages.ready(adapter, asked)
    fitting = _convert_stages.fitted(ready, asked)
    own = adapter.layout.name == asked.goal.name and not (asked.changes or initial)
    if fitting.misfits and own and _is_spelt(adapter, fitting.fitted):
        return _as_it_is(adapter, asked.form)
    modules = fitting.modules(asked.store)
    dropped = [*ready.components, *fitting.misfits, *_remarks.untold(adapter, asked.goal)]
    _settle.settle(dropped, asked.drop, ready.adapter, asked.named, nothing=not modules)
    if not modules:
        raise LayoutError(
            "nothing is left to write", path=adapter.path or None, todo="Drop less, or choose another layout"
        )
    kept = _settle.without(replace(ready.adapter, modules=modules, order=()), fitting.extras)
    return _converted(adapter, asked, ready, fitting, kept, dropped)


def _converted(
    adapter: Adapter, asked: Asked, ready: Ready, fitting: Fitting, kept: Adapter, dropped: Sequence[Misfit]
) -> Converted:
    """What is left of an adapter as a document, with the account of every tensor and what is to be proven of it."""
    form, host, demand, fitted = asked.form, asked.host, asked.demand, fitting.fitted
    family = form.family(adapter, host.model_type) or ""
    renamed = _reread.names([target.path for target in kept.modules], form, family)
    written = _row_orders.as_written(kept, form, host) if ready.reordered else kept
    document = formats.document(written, asked.goal, form)
    document = _normal_form.configured(document, form, demand, host, kept)
    ledger = _ledger.account(
        adapter, ready.adapter, fitted, ready.origins, dropped, written=document.tensors, form=form
    )
    provable = _prove.provable(ready.origins, ready.conversions)
    beside = _normal_form.tied(fitting.beside, host)
    remarks = (*_remarks.remarks(kept, form, dropped, asked.drop), *_reread.notes(renamed, form), *beside)
    lost = _normal_config.lost(adapter, document, form)
    return Converted(
        kept,
        document,
        _normal_form.told(ledger, fitted, fitting.beside),
        tuple(_prove.expected(fitted, provable, ready.adapter)),
        _prove.rounded(fitted, asked.store, ready.adapter.arch, provable),
        tuple(ready.conversions),
        tuple(dict.fromkeys((*ready.adapter.notes, *fitting.notes, *remarks, *lost))),
        host,
        ready.reordered,
        _normal_form.normal(demand, fitted, ready.origins, ready.conversions, fitting.beside),
        ready.about,
        renamed,
    )


def _is_spelt(adapter: Adapter, fitted: Sequence[Fitted]) -> bool:
    """Whether all that can be spelt anew is spelt so in the file already."""
    names = set(adapter.order)
    return bool(names) and all(ref.name in names for each in fitted for ref in each.spelt)


def _as_it_is(adapter: Adapter, form: Format) -> Converted:
    """The adapter in its own layout, of which something can be read and kept, but not spelt anew."""
    ledger = tuple(LedgerEntry(key, "moved", (key,)) for key in adapter.order)
    document = formats.document(adapter, adapter.layout, form)
    modules = tuple(adapter.modules.values())
    return Converted(adapter, document, ledger, modules, {}, (), adapter.notes)


@uploads
@unchanged.watched
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
            progress=_convert_report.counted(progress, len(converted.document.tensors)),
            check=prove,
        )
    report = _convert_report.report(
        adapter, converted, os.fspath(output), to, size, found[0] if found else None
    )
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
    if files.within(output, base):
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
