"""What a resize tells: of every module, in the file's metadata, and in sentences."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from loratools import __version__, formats
from loratools.io import storage
from loratools.model import Adapter, Module, Target
from loratools.ops import _merged, _resize_ranks, files
from loratools.ops._resize_module import Resized, has_kernel
from loratools.ops._resize_options import Options
from loratools.ops.resize_results import ResizedModule, ResizeReport

RECORD = "loratools.resize"
_ROUNDING = 1e-12  # of sums of squares
# What describes the file that the metadata came with, in PEFT's words, and how that one was made.
_STALE = ("lora_adapter_metadata", _merged.RECIPE, RECORD)


def metadata(adapter: Adapter, asked: Options, inputs: _merged.Inputs) -> dict[str, str]:
    """The input's string metadata, and a record of what was resized; ranks in it are made true when it is written."""
    kept = {
        key: value
        for key, value in adapter.metadata.items()
        if not key.startswith("sshs_") and key not in _STALE
    }
    sources = [_merged.recorded(each) for each in inputs.described()]
    limits = {
        "min_rank": asked.least if asked.least > 1 else None,
        "max_rank": asked.most,
        "conv_rank": asked.conv_rank,
        "multiple_of": asked.multiple if asked.multiple > 1 else None,
        "to_rank_of": asked.server or None,
        "against": asked.norm or None,
    }
    record = {
        "version": __version__,
        # A size is left out: what the file says of it would be a part of it.
        "rule": "size" if asked.kind == "size" else asked.text,
        **{name: value for name, value in limits.items() if value is not None},
        "input": {key: value for key, value in sources[0].items() if key != "weight"},
    }
    return {**kept, RECORD: json.dumps(record)}


def report(
    given: Adapter,
    original: Adapter,
    result: Adapter,
    asked: Options,
    results: Mapping[Target, Resized],
    norms: Mapping[Target, float],
) -> ResizeReport:
    """What was done.

    Args:
        given: The input in the layout of the result.
        original: The input as it came.
        result: The adapter at its new ranks.
        asked: What was asked for.
        results: By target, of the modules that were cut.
        norms: By target, of the weights that directions were scored against.
    """
    modules = [
        _entry(target, given.modules[target], module, results.get(target), norms.get(target))
        for target, module in result.modules.items()
    ]
    return ResizeReport(
        rule=asked.text,
        input=original.path,
        output="",
        bytes_before=_bytes_of(original),
        bytes=0,
        layout=result.layout.name,
        arch=result.arch,
        modules=tuple(modules),
        curves=_curves(results),
        dropped=tuple(str(target) for target in given.modules if target not in result.modules),
        carried=tuple(result.extras),
        dtypes=_dtypes(result),
        notes=result.notes,
    )


def in_layout(report: ResizeReport, result: Adapter) -> ResizeReport:
    """The report of an adapter that was brought into another layout after it was cut."""
    notes = [*report.notes]
    before = {module.target: module.rank for module in report.modules}
    grown = [
        target
        for target, module in result.modules.items()
        if (module.rank or 0) > max((before.get(str(target)) or 0, *(rank or 0 for rank in before.values())))
    ]
    if grown:
        notes.append(
            f"{len(grown)} weights were fused for the {result.layout.name} layout and have the sum of their parts' "
            f"ranks (first: {grown[0]}); another resize of the result cuts them"
        )
    return report._replace(layout=result.layout.name, dtypes=_dtypes(result), notes=tuple(notes))


def notes(
    adapter: Adapter,
    asked: Options,
    modules: Mapping[Target, Module],
    results: Mapping[Target, Resized],
    server: int | None,
) -> list[str]:
    """What the caller should know of a result that is right, and may surprise."""
    said = _of_modules([each.note for each in results.values() if each.note])
    said += _fewer(asked, modules, results)
    said += _rounded(asked, results)
    full = [
        str(target)
        for target, module in adapter.modules.items()
        if module.kind == "full" and len(module.shape or ()) > 1
    ]
    if full:
        said.append(
            f"{len(full)} modules are full differences and were carried as they are (first: {full[0]}); convert --as "
            "lora turns them into LoRA"
        )
    if server is not None and not asked.norm:
        needs = [_resize_ranks.own(asked, modules[target], each.spectrum) for target, each in results.items()]
        more = sum(rank > server for rank in needs)
        if more:
            said.append(
                f"rank {server} is the largest of {asked.server}'s that is allowed; {more} of {len(needs)} modules "
                f"need more for {asked.text} (up to {max(needs)})"
            )
    return said


def _of_modules(found: Sequence[str]) -> list[str]:
    """A few notes of single modules, and the count of the others."""
    more = len(found) - 3
    return [*found[:3], *([f"and so are {more} more modules"] if more > 0 else [])]


def _fewer(asked: Options, modules: Mapping[Target, Module], results: Mapping[Target, Resized]) -> list[str]:
    """Modules that have not as many directions as they were to keep."""
    found = []
    for target, each in results.items():
        wanted = asked.fixed(wide=has_kernel(modules[target])) or asked.least
        if not asked.server and (each.module.rank or 0) < wanted and each.spectrum.total:
            found.append((target, each.module.rank, wanted))
    if not found:
        return []
    target, rank, wanted = found[0]
    return [
        f"{len(found)} of {len(modules)} modules have fewer directions than rank {wanted} and keep all that they have "
        f"(first: {target}, rank {rank})"
    ]


def _rounded(asked: Options, results: Mapping[Target, Resized]) -> list[str]:
    """Modules whose rank keeps to the error that was asked for, and whose store dtype does not."""
    if asked.kind != "error" or asked.norm:
        return []
    above = {
        str(target): each.error
        for target, each in results.items()
        if 1.0 - each.energy <= asked.value**2 and each.error > asked.value * (1.0 + _ROUNDING)
    }
    if not above:
        return []
    worst = max(above, key=above.__getitem__)
    return [
        f"{len(above)} of {len(results)} modules have an error above {asked.value:g} by the rounding of their store "
        f"dtype (most: {worst}, {above[worst]:.3g}); --dtype float32 keeps to it"
    ]


def _entry(
    target: Target, before: Module, after: Module, found: Resized | None, norm: float | None
) -> ResizedModule:
    kind = "dora" if before.magnitude is not None else before.kind
    if found is None:
        return ResizedModule(
            str(target), target.component, kind, before.rank, after.rank, 1.0, 0.0, 0.0, after.shape, False
        )
    return ResizedModule(
        target=str(target),
        component=target.component,
        kind=kind,
        before=before.rank,
        rank=after.rank,
        energy=found.energy,
        error=found.error,
        norm=math.sqrt(found.spectrum.total),
        shape=after.shape,
        changed=found.module is not before,
        weight_norm=norm,
    )


def _curves(results: Mapping[Target, Resized]) -> dict[str, dict[int, float]]:
    """By component, the fraction of Σσ² in the first 1, 2, 4, … directions of every module."""
    groups: dict[str, list[Resized]] = {}
    for target, each in results.items():
        groups.setdefault(target.component, []).append(each)
    return {name: _curve(own) for name, own in groups.items()}


def _curve(members: Sequence[Resized]) -> dict[int, float]:
    total = math.fsum(each.spectrum.total for each in members)
    longest = max(each.spectrum.sigma.size for each in members)
    if not total:
        return {1: 1.0}
    sums = [np.cumsum(np.square(each.spectrum.sigma)) for each in members if each.spectrum.sigma.size]
    ranks = [1 << power for power in range(longest.bit_length())]
    if ranks[-1] < longest:
        ranks.append(longest)
    kept = {rank: math.fsum(float(own[min(rank, own.size) - 1]) for own in sums) / total for rank in ranks}
    # All that there is may add up to a little less.
    return {rank: 1.0 if share > 1.0 - _ROUNDING else share for rank, share in kept.items()}


def _dtypes(adapter: Adapter) -> dict[str, int]:
    return dict(Counter(ref.dtype for each in adapter.modules.values() for _, ref in each.tensors()))


def _bytes_of(adapter: Adapter) -> int:
    """The size of an adapter's file, and of the configuration that its layout keeps beside it."""
    if not storage.is_file(adapter.path):
        return 0
    size = storage.size(adapter.path)
    form = formats.get(adapter.layout.name) if adapter.layout.name != "unknown" else None
    beside = os.path.join(os.path.dirname(adapter.path), files.CONFIG)
    return size + (
        storage.size(beside) if form is not None and form.folder and storage.is_file(beside) else 0
    )
