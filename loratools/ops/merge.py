"""Several adapters into one: every method is applied to ΔW, module by module, in factor space where it allows it."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

from loratools import __version__, formats
from loratools.engine import local
from loratools.errors import OptionError
from loratools.model import EMPTY, Adapter, Target
from loratools.ops import _combine, _merged, align, files, recipe
from loratools.ops._combine import Combined
from loratools.ops._merge_steps import ENERGY, STRENGTH, Steps
from loratools.ops._request import Request, refuse, request
from loratools.ops._weights import Spec
from loratools.ops.align import Contribution
from loratools.ops.results import MergeReport

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
    arch: str | None = None,
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
        arch: What the inputs were read as where detection was overridden; for the recipe alone.
        progress: Called with the module's name, its number and the count of all.
        options: The method's own, by name (``density``, ``lam``, ``seed``).

    Returns:
        The merged adapter, in memory, and what was done.

    Raises:
        LoraError: The inputs cannot be merged; the message says which and why.
    """
    together = align.clarified([*adapters, *protect])
    dropping = tuple(drop)
    asked = request(
        together[: len(adapters)],
        weights=weights,
        component_weights=_specs(component_weights),
        block_weights=_specs(block_weights),
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
        device=device,
        allow_nonfinite=allow_nonfinite,
        options=options,
        said={
            "component_weights": list(map(_plain, _specs(component_weights))),
            "block_weights": list(map(_plain, _specs(block_weights))),
            "weight_for": {name: str(weight) for name, weight in weight_for.items()},
            "dtype": dtype,
            "arch": arch,
            "drop": dropping,
        },
    )
    refuse(asked)
    return _merge(asked, dropping, threads, progress)


def _merge(
    asked: Request, drop: Sequence[str], threads: int | None, progress: Progress | None
) -> tuple[Adapter, MergeReport]:
    # A weight of 0 is absence: of modules, and of what lies beside them.
    present = [each for each, weight in zip(asked.adapters, asked.weights, strict=True) if weight != 0.0]
    extras, dropped = _merged.extras(present, asked.layout.name, drop)
    form = formats.get(asked.layout.name)
    everything = [*asked.adapters, *asked.steps.styles]
    targets = align.align(everything, asked.arch, form.dialect, form.name)
    with _merged.Inputs(asked.adapters, asked.weights, asked.weigh.hits) as inputs:
        results = _run(asked, targets, threads, progress)
        described = inputs.described()
    _combine.refuse_nonfinite(list(results.values()), [adapter.path for adapter in everything])
    modules = {target: each.module for target, each in results.items() if each.module is not None}
    if not modules:
        raise OptionError("every weight is 0: nothing is left to merge")
    merged = Adapter(
        modules=modules,
        extras=extras,
        metadata=_merged.metadata(
            asked.adapters, asked.method.name, described, recipe.document(asked, described)
        ),
        arch=asked.arch,
        layout=asked.layout,
        config=_merged.config(present, modules, extras),
        notes=tuple(dict.fromkeys([*_notes(asked, results), *_merged.remarks(asked, extras, modules)])),
    )
    return merged, _merged.report(asked, merged, results, described, dropped)


def _notes(asked: Request, results: Mapping[Target, Combined]) -> list[str]:
    notes = [note for adapter in asked.adapters for note in adapter.notes]
    notes += [each.note for each in results.values() if each.note]
    remarks = Counter(each.remark for each in results.values() if each.remark)
    return notes + [
        f"{count} module{'s' if count > 1 else ''}: {remark}" for remark, count in remarks.items()
    ]


def _specs(given: Spec | Sequence[Spec]) -> list[Spec]:
    """One set for all inputs as a list of one."""
    if isinstance(given, Mapping | str):
        return [given] if given else []
    vector = [float(each) for each in given if isinstance(each, Real)]
    return [vector] if vector else [each for each in given if isinstance(each, Mapping | Sequence)]


def _plain(spec: Spec) -> Any:
    """A set of multipliers as JSON has it, whatever types its numbers are of."""
    if isinstance(spec, str):
        return spec
    if isinstance(spec, Mapping):
        return {name: float(weight) for name, weight in spec.items()}
    return [float(weight) for weight in spec]


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


def merge_files(
    paths: Sequence[files.PathLike],
    output: files.PathLike,
    *,
    protect: Sequence[files.PathLike] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    arch: str | None = None,
    save_recipe: files.PathLike | None = None,
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
    merged, report = merge(adapters, protect=styles, arch=arch, **options)
    if dry_run:
        return report._replace(output=os.fspath(output), bytes=files.size(merged))
    saving: AbstractContextManager[None] = nullcontext()
    if save_recipe is not None:
        saving = recipe.saved(
            merged.metadata[_merged.RECIPE], save_recipe, paths, protect, overwrite=overwrite
        )
    with saving:
        written = files.save(merged, output, overwrite=overwrite)
    return report._replace(output=os.fspath(output), bytes=written)


def merge_recipe(
    path: files.PathLike,
    output: files.PathLike,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
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

    Raises:
        LoraError: The recipe cannot be read, or an input is not the file that it was; nothing was written.
    """
    files.check_output(output, overwrite=overwrite)
    found = recipe.read(path)
    unverified = recipe.verify(found)
    report = merge_files(
        found.paths,
        output,
        protect=found.protect,
        overwrite=overwrite,
        dry_run=dry_run,
        threads=threads,
        progress=progress,
        **{**found.arguments, **({"device": device} if device is not None else {})},
    )
    notes = list(report.notes)
    if unverified:
        notes.append(f"the recipe has no sha256 of {', '.join(unverified)}: the contents were not verified")
    if found.version not in ("", __version__):
        notes.append(f"the recipe is of loratools {found.version}, this is {__version__}: bits may differ")
    return report._replace(notes=tuple(notes))
