"""Several adapters into one: every method is applied to ΔW, module by module, in factor space where it allows it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from loratools import formats
from loratools.engine import local
from loratools.errors import OptionError
from loratools.model import Adapter, Module, Target
from loratools.ops import _combine, _merged, align, files
from loratools.ops._combine import Combined
from loratools.ops._request import Request, refuse, request
from loratools.ops._weights import Spec
from loratools.ops.align import Contribution
from loratools.ops.results import MergedModule, MergeReport

Progress = Callable[[str, int, int], None]


def merge(
    adapters: Sequence[Adapter],
    *,
    weights: Sequence[float] | None = None,
    component_weights: Spec | Sequence[Spec] = (),
    block_weights: Spec | Sequence[Spec] = (),
    method: str = "linear",
    rank: int | None = None,
    layout: str | None = None,
    dtype: str = "keep",
    device: str = "auto",
    threads: int | None = None,
    allow_nonfinite: bool = False,
    drop: Iterable[str] = (),
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Adapter, MergeReport]:
    """Combine adapters into one.

    Args:
        adapters: Of one architecture; rank, alpha, layout, dtype and modules may differ.
        weights: What each ΔW is multiplied by; default 1 each. A weight of 0 is absence.
        component_weights: Multipliers by component's name ({"text_encoder": 0.5}); one mapping for all inputs, or a
            list of one for each.
        block_weights: Multipliers by block: a mapping from labels (IN04, MID, D07), components or beginnings of paths,
            or a vector of as many numbers as the architecture knows; one for all inputs, or a list of one for each.
        method: "linear", "concat", "ties", …
        rank: Of the result, a count; None: lossless where the method allows it.
        layout: Of the result; default as the first input came.
        dtype: "float32", "float16", "bfloat16", "float64", or "keep": the inputs' own, the wider where they differ.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        threads: How many modules are worked on side by side, a count; default: one per processor.
        allow_nonfinite: Go on with NaN or Inf in a factor.
        drop: What may be left out: "extras", the tensors that belong to no module.
        progress: Called with the module's name, its number and the count of all.
        options: The method's own, by name (``density``, ``lam``, ``seed``).

    Returns:
        The merged adapter, in memory, and what was done.

    Raises:
        LoraError: The inputs cannot be merged; the message says which and why.
    """
    asked = request(
        align.clarified(adapters),
        weights=weights,
        component_weights=_specs(component_weights),
        block_weights=_specs(block_weights),
        method=method,
        rank=rank,
        layout=layout,
        dtype=dtype,
        device=device,
        allow_nonfinite=allow_nonfinite,
        options=options,
    )
    refuse(asked)
    # A weight of 0 is absence: of modules, and of what lies beside them.
    present = [each for each, weight in zip(asked.adapters, asked.weights, strict=True) if weight != 0.0]
    extras, dropped = _merged.extras(present, asked.layout.name, drop)
    form = formats.get(asked.layout.name)
    targets = align.align(asked.adapters, asked.arch, form.dialect, form.name)
    with _merged.Inputs(asked.adapters, asked.weights) as inputs:
        results = _run(asked, targets, threads, progress)
        described = inputs.described()
    _combine.refuse_nonfinite(list(results.values()), [adapter.path for adapter in asked.adapters])
    modules = {target: each.module for target, each in results.items() if each.module is not None}
    if not modules:
        raise OptionError("every weight is 0: nothing is left to merge")
    notes = [note for adapter in asked.adapters for note in adapter.notes]
    notes += [each.note for each in results.values() if each.note]
    notes += _merged.remarks(asked, extras, modules)
    merged = Adapter(
        modules=modules,
        extras=extras,
        metadata=_merged.metadata(asked.adapters, asked.method.name, described),
        arch=asked.arch,
        layout=asked.layout,
        config=_merged.config(present, modules, extras),
        notes=tuple(dict.fromkeys(notes)),
    )
    return merged, _report(asked, merged, results, described, dropped)


def _specs(given: Spec | Sequence[Spec]) -> Sequence[Spec]:
    """One set for all inputs as a list of one."""
    if isinstance(given, Mapping):
        return [given] if given else []
    vector = [each for each in given if isinstance(each, int | float)]
    if vector:
        return [vector]
    return [each for each in given if not isinstance(each, int | float)]


def _run(
    asked: Request,
    targets: Mapping[Target, Sequence[Contribution]],
    threads: int | None,
    progress: Progress | None,
) -> dict[Target, Combined]:
    def work(target: Target) -> Combined:
        return _combine.combine(asked, target, targets[target])

    results: dict[Target, Combined] = {}
    for number, (target, result) in enumerate(
        zip(targets, local.run(work, targets, threads=threads), strict=True), start=1
    ):
        results[target] = result
        if progress is not None:
            progress(str(target), number, len(targets))
    return results


def _report(
    asked: Request,
    merged: Adapter,
    results: Mapping[Target, Combined],
    inputs: Sequence[Mapping[str, Any]],
    dropped: tuple[str, ...],
) -> MergeReport:
    # What was carried over or kept whole has lost nothing.
    whole = sum(each.size / (1.0 if each.energy is None else each.energy or 1.0) for each in results.values())
    modules = merged.modules.values()
    return MergeReport(
        method=asked.method.name,
        options={option.name: getattr(asked.options, option.field) for option in asked.method.options},
        inputs=tuple(inputs),
        modules=tuple(_entry(target, module, results[target]) for target, module in merged.modules.items()),
        energy=sum(each.size for each in results.values()) / whole if whole else 1.0,
        layout=asked.layout.name,
        arch=asked.arch,
        dtypes=dict(Counter(ref.dtype for module in modules for _, ref in module.tensors())),
        ranks=dict(sorted(Counter(module.rank or 0 for module in modules).items())),
        carried=tuple(merged.extras),
        dropped=dropped,
        notes=merged.notes,
    )


def _entry(target: Target, module: Module, result: Combined) -> MergedModule:
    return MergedModule(
        str(target), target.component, result.sources, module.rank or 0, result.energy, module.shape
    )


def merge_files(
    paths: Sequence[files.PathLike],
    output: files.PathLike,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    arch: str | None = None,
    **options: Any,
) -> MergeReport:
    """Load, merge and write.

    Args:
        paths: The inputs.
        output: A file, or a folder where the layout wants one.
        overwrite: Whether an existing output may be replaced.
        dry_run: Do everything but write.
        arch: The inputs' architecture, overriding detection.
        options: As for ``merge``.

    Raises:
        LoraError: Nothing was written.
    """
    # Whatever is wrong with the output is said before any work is done, not after.
    files.check_output(output, overwrite=overwrite)
    adapters = [files.load(path, arch=arch) for path in paths]
    layout = options.get("layout") or (adapters[0].layout.name if adapters else "")
    if layout in formats.writable():
        files.check_name(output, layout)
    merged, report = merge(adapters, **options)
    if dry_run:
        return report._replace(output=os.fspath(output), bytes=files.size(merged))
    written = files.save(merged, output, overwrite=overwrite)
    return report._replace(output=os.fspath(output), bytes=written)
