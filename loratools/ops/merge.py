"""Several adapters into one: every method is applied to ΔW, module by module, in factor space where it allows it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from loratools import __version__, formats
from loratools.engine import Engine
from loratools.errors import OptionError
from loratools.formats import _peft_special
from loratools.io import unchanged
from loratools.io.base import config_of
from loratools.io.uploading import uploads
from loratools.model import EMPTY, Adapter
from loratools.ops import (
    _combine,
    _device,
    _extras,
    _extras_dora,
    _fused_names,
    _merge_kept,
    _merge_remarks,
    _merge_run,
    _merged,
    _moe_open,
    _prediction,
    align,
    files,
    recipe,
)
from loratools.ops._extras_base import BaseModel
from loratools.ops._extras_rows import REFUSE
from loratools.ops._extras_ways import checked_drop
from loratools.ops._merge_steps import ENERGY, STRENGTH, Steps, shown_name
from loratools.ops._request import Request, refuse, request
from loratools.ops._weight_specs import plain, specs
from loratools.ops._weights import Spec
from loratools.ops.merge_results import MergeReport

Progress = Callable[[str, int, int], None]


def merge(
    adapters: Sequence[Adapter],
    *,
    weights: Sequence[float] | None = None,
    component_weights: Spec | Sequence[Spec] = (),
    block_weights: Spec | Sequence[Spec] = (),
    weight_for: Mapping[str, float | str] = EMPTY,
    method: str = "linear",
    rank: int | None = None,
    protect: Sequence[Adapter] = (),
    protect_energy: float = ENERGY,
    protect_strength: float | None = STRENGTH,
    boost: float | None = None,
    layout: str | None = None,
    dtype: str = "keep",
    device: str = "auto",
    threads: int | None = None,
    allow_nonfinite: bool = False,
    drop: Iterable[str] = (),
    full_modules: str | int = "refuse",
    base: files.PathLike | None = None,
    arch: str | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
    **options: Any,
) -> tuple[Adapter, MergeReport]:
    """Combine adapters into one.

    Args:
        adapters: Of one architecture; rank, alpha, layout, dtype and modules may differ.
        weights: What each ΔW is multiplied by; default 1 each. A weight of 0 is absence.
        component_weights: Multipliers by component's name ({"text_encoder": 0.5}); one mapping for all inputs, or a
            list of one for each.
        block_weights: Multipliers by block: a mapping from labels (IN04, MID, D07), components or beginnings of paths,
            a vector of as many numbers as the architecture knows, or a preset's name (MIDD); one for all inputs, or a
            list of one for each.
        weight_for: Multipliers by pattern, of which the last that matches a module's path counts: a regular
            expression, or a range of layers with a weight or a gradient ({"layers.0-31": "0..1"}); after "2:", for
            the second input alone.
        method: "linear", "concat", "ties", …
        rank: Of the result, a count; None: lossless where the method allows it.
        protect: Adapters in whose main directions the inputs are projected away before they are merged. An input that
            is one of them stays as it is.
        protect_energy: Which directions those are: the first that hold this fraction of Σσ², in (0, 1].
        protect_strength: μ: the share μ/(1 + μ) of what lies there is taken away; None for all of it.
        boost: Raise the singular values of the result that lie behind this fraction of Σσ, in [0, 1].
        layout: Of the result; default as the first input came.
        dtype: "float32", "float16", "bfloat16", "float64", or "keep": the inputs' own, the wider where they differ.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        threads: How many modules are worked on side by side, a count; default: one per processor.
        allow_nonfinite: Go on with NaN or Inf in a factor.
        drop: What may be left out: "extras", the tensors that belong to no module.
        full_modules: What is done with modules that several inputs hold in full and differ on: "refuse", "first",
            "average" (by the weights), "sum" (of the weighted differences from the base), or an input's number,
            counted from 1.
        base: The model that the inputs were trained on: for DoRA, whose ΔW depends on it, for the sum of biases and
            of modules saved in full, and for which rows of its fused weights are whose.
        arch: What the inputs were read as where detection was overridden; for the recipe alone.
        progress: Called with the module's name, its number and the count of all.
        engine: Where to compute; default: this machine's threads, or its accelerator.
        options: The method's own, by name (``density``, ``lam``, ``seed``).

    Returns:
        The merged adapter, in memory, and what was done.

    Raises:
        LoraError: The inputs cannot be merged; the message says which and why.
    """
    together = align.clarified([*adapters, *protect])
    for each in together:
        _peft_special.refuse_unmergeable(each)
    dropping = tuple(drop)
    model = None
    if base is not None:
        model = BaseModel(base, align.common_arch(together), together)
    together = _fused_names.alike(together, model)
    together, experts = _moe_open.opened(together, layout, {} if base is None else config_of(base)[1])
    store = _extras_dora.store_dtype(together) if dtype == "keep" else None
    together = _extras_dora.changes(together, model, rank)
    asked = request(
        together[: len(adapters)],
        weights=weights,
        component_weights=specs(component_weights),
        block_weights=specs(block_weights),
        weight_for=weight_for,
        steps=Steps(
            styles=tuple(together[len(adapters) :]),
            energy=protect_energy,
            strength=math.inf if protect_strength is None else protect_strength,
            boost=boost,
        ),
        method=method,
        rank=rank,
        layout=layout,
        dtype=dtype,
        device=_device.for_engine(device, engine),
        allow_nonfinite=allow_nonfinite,
        options=options,
        said={
            "component_weights": list(map(plain, specs(component_weights))),
            "block_weights": list(map(plain, specs(block_weights))),
            "weight_for": {name: str(weight) for name, weight in weight_for.items()},
            "dtype": dtype,
            "arch": arch,
            "drop": dropping,
            "full_modules": "" if full_modules == REFUSE else str(full_modules),
            "base": "" if model is None else shown_name(model.path),
        },
        base=model,
        full_modules=full_modules,
    )
    if store is not None:
        asked = replace(asked, dtype=store)
    refuse(asked)
    merged, report = _merge(asked, dropping, threads, progress, engine)
    return experts.closed(merged), report


def _merge(
    asked: Request,
    drop: Sequence[str],
    threads: int | None,
    progress: Progress | None,
    engine: Engine | None,
) -> tuple[Adapter, MergeReport]:
    # A weight of 0 is absence: of modules, and of what lies beside them.
    numbers = [number for number, weight in enumerate(asked.weights) if weight != 0.0]
    present = [asked.adapters[number] for number in numbers]
    beside = _extras.beside(
        _extras.Asked(
            present,
            numbers,
            [asked.weights[number] for number in numbers],
            asked.layout.name,
            asked.way,
            asked.base,
        ),
        drop=checked_drop(drop),
    )
    form = formats.get(asked.layout.name)
    everything = [*asked.adapters, *asked.steps.styles]
    targets = align.align(everything, asked.arch, form.dialect, form.name)
    with _merged.Inputs(asked.adapters, asked.weights, asked.weigh.hits) as inputs:
        results = _merge_run.run(asked, targets, threads, progress, engine)
        described = inputs.described()
    _combine.refuse_nonfinite(list(results.values()), [adapter.path for adapter in everything])
    left = {target: each for target, each in results.items() if each.module is not None}
    modules = {target: each.module for target, each in left.items() if each.module is not None}
    if not modules:
        raise OptionError("every weight is 0: nothing is left to merge")
    merged = Adapter(
        modules=modules,
        extras=beside.extras,
        metadata=_merged.metadata(
            asked.adapters, asked.method.name, described, recipe.document(asked, described)
        ),
        arch=asked.arch,
        layout=asked.layout,
        config=_merged.config(present, modules, beside.extras, beside.config),
        notes=tuple(
            dict.fromkeys(
                [
                    *_merge_remarks.noted(asked, results),
                    *beside.notes,
                    *_merge_remarks.remarks(asked, left, beside.whole),
                ]
            )
        ),
    )
    return merged, _merged.report(asked, merged, targets, results, described, beside.dropped)


@uploads
@unchanged.watched
def merge_files(
    paths: Sequence[files.PathLike],
    output: files.PathLike,
    *,
    protect: Sequence[files.PathLike] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    arch: str | None = None,
    save_recipe: files.PathLike | None = None,
    engine: Engine | None = None,
    resume: bool = False,
    **options: Any,
) -> MergeReport:
    """Load, merge and write.

    Args:
        paths: The inputs.
        output: A file, or a folder where the layout wants one.
        protect: Adapters whose main directions the inputs are kept off.
        overwrite: Whether an existing output may be replaced.
        dry_run: Do everything but write.
        arch: The inputs' architecture, overriding detection.
        save_recipe: Where to write what repeats this merge, for ``merge_recipe``.
        engine: Where to compute; default: this machine's threads, or its accelerator.
        resume: Go on with a merge that was interrupted, and keep what is done if this one is. What was done is written
            down once a second, whether this is asked for or not, but for merges that decompose nothing.
        options: As for ``merge``.

    Raises:
        LoraError: Nothing was written.
    """
    # Whatever is wrong with the outputs is said before any work is done, not after.
    files.check_output(output, overwrite=overwrite)
    if save_recipe is not None:
        recipe.check_output(save_recipe, [output, *paths, *protect], overwrite=overwrite)
    adapters = [files.load(path, arch=arch) for path in paths]
    styles = [files.load(path, arch=arch) for path in protect]
    layout = options.get("layout") or (adapters[0].layout.name if adapters else "")
    if layout in formats.writable():
        files.check_name(output, layout)
    if dry_run:
        threads = options.get("threads")
        seen = _prediction.foreseeing(engine, threads, inputs=[*paths, *protect], output=output)
        merged, report = merge(adapters, protect=styles, arch=arch, engine=seen, **options)
        size = files.size(merged)
        estimate = _prediction.foreseen(seen, engine, threads, assembled=size)
        return report._replace(output=os.fspath(output), bytes=size, estimate=estimate)
    told = {**options, "arch": arch}
    with _merge_kept.keeping(merge, output, adapters, styles, told, engine=engine, resume=resume) as kept:
        merged, report = merge(adapters, protect=styles, arch=arch, engine=kept.engine, **options)
        saving: AbstractContextManager[None] = nullcontext()
        if save_recipe is not None:
            saving = recipe.saved(
                merged.metadata[_merged.RECIPE],
                save_recipe,
                recipe.Sources(paths, protect, options.get("base")),
                overwrite=overwrite,
            )
        with saving:
            written = files.save(merged, output, overwrite=overwrite)
    notes = (*report.notes, *kept.notes)
    return report._replace(output=os.fspath(output), bytes=written, notes=notes, resumed=kept.taken)


@uploads
@unchanged.watched
def merge_recipe(
    path: files.PathLike,
    output: files.PathLike,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
    resume: bool = False,
    allow_urls: bool = False,
) -> MergeReport:
    """Repeat the merge that a recipe describes, bit for bit on the same kind of device.

    Args:
        path: The recipe.
        output: A file, or a folder where the layout wants one.
        overwrite: Whether an existing output may be replaced.
        dry_run: Do everything but write.
        device: Where to compute; default: where the recipe's merge was computed.
        threads: How many modules are worked on side by side, a count; default: one per processor.
        progress: As for ``merge``.
        engine: As for ``merge``.
        resume: As for ``merge_files``.
        allow_urls: Whether inputs that the recipe names by URLs are read: otherwise they are refused.

    Raises:
        LoraError: The recipe cannot be read, or an input is not the file that it was; nothing was written.
    """
    files.check_output(output, overwrite=overwrite)
    found = recipe.read(path, allow_urls=allow_urls)
    unverified = recipe.verify(found)
    report = merge_files(
        found.paths,
        output,
        protect=found.protect,
        overwrite=overwrite,
        dry_run=dry_run,
        threads=threads,
        progress=progress,
        engine=engine,
        resume=resume,
        **{**found.arguments, **({"device": device} if device is not None else {})},
    )
    notes = list(report.notes)
    if unverified:
        notes.append(f"the recipe has no sha256 of {', '.join(unverified)}: the contents were not verified")
    if found.version not in ("", __version__):
        notes.append(f"the recipe is of loratools {found.version}, this is {__version__}: bits may differ")
    return report._replace(notes=tuple(notes))
