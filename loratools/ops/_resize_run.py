"""The modules of a resize: which can be cut, to what ranks, and what becomes of them.

The CPU works on several side by side, an accelerator on batches of modules of one make-up (``_resize_batch``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from loratools import kinds
from loratools.errors import OptionError, UnsupportedKindError
from loratools.model import Adapter, Layout, Module, Target
from loratools.ops import (
    _as_kind,
    _merged,
    _resize_layout,
    _resize_ranks,
    _resize_report,
    files,
)
from loratools.ops._base_weights import Weights
from loratools.ops._resize_each import Work, each_module, needs_base
from loratools.ops._resize_module import Resized, has_kernel
from loratools.ops._resize_options import Options
from loratools.ops._resize_ranks import Known
from loratools.ops._resize_steps import CUTTING, SEEING, Cutting, Made, Seeing, Seen
from loratools.ops._resize_store import Form, cost, shaped
from loratools.ops.resize_results import ResizeReport


def run(work: Work, original: Adapter) -> tuple[Adapter, ResizeReport]:
    """The adapter at its new ranks, and what was done."""
    with _merged.Inputs([original], [1.0]) as inputs:
        ranks, norms = _planned(work, inputs) if work.asked.together else ({}, {})
        server = next(iter(ranks.values()), None) if work.asked.server else None
        results = _cut(work, ranks, work.form._replace(rank=server))
        result = _assembled(work, {target: each.module for target, each in results.items()}, inputs)
    notes = _resize_report.notes(work.adapter, work.asked, work.modules, results, server)
    result = replace(result, notes=tuple(dict.fromkeys([*original.notes, *notes])))
    return result, _resize_report.report(work.adapter, original, result, work.asked, results, norms)


def to_cut(adapter: Adapter, asked: Options, base: Weights | None) -> dict[Target, Module]:
    """The modules that have a ΔW to be cut, with the kernels that a base tells of.

    Raises:
        UnsupportedKindError: Some need a base that was not given, or cannot be turned into LoRA; all are named.
        OptionError: There is none.
    """
    modules = {
        target: module
        for target, module in adapter.modules.items()
        if module.kind != "full" and not (asked.conv_rank == 0 and has_kernel(module))
    }
    if not modules:
        raise OptionError(
            "no module has a rank to be cut",
            path=adapter.path or None,
            expected="Modules of low rank were expected",
            todo="Turn full differences into LoRA with convert --as lora",
        )
    _refuse_kinds(adapter, modules, has_base=base is not None)
    if base is None:
        return modules
    return {target: _as_kind.with_kernel(module, base) for target, module in modules.items()}


def _refuse_kinds(adapter: Adapter, modules: Mapping[Target, Module], *, has_base: bool) -> None:
    unknown = [module for module in modules.values() if kinds.get(module.kind).dense is None]
    lacking = [module for module in modules.values() if needs_base(module)]
    for found, why, todo in (
        (unknown, "whose ΔW cannot be computed", "Leave them out with convert --drop"),
        ([] if has_base else lacking, "whose ΔW depends on the base weights", "Give the model with --base"),
    ):
        if found:
            titles = {
                "DoRA" if each.magnitude is not None else kinds.get(each.kind).title: None for each in found
            }
            raise UnsupportedKindError(
                f"{len(found)} of {len(adapter.modules)} modules are {' and '.join(titles)}, {why}",
                path=adapter.path or None,
                keys=[str(module.target) for module in found],
                todo=todo,
            )


def common_alpha(layout: Layout, modules: Mapping[Target, Module], asked: Options) -> float | None:
    """One alpha for all modules of a Kohya file: the rank, or of other rules most modules' present one."""
    if layout.name != "kohya":
        return None
    counts = Counter(module.rank for module in modules.values() if module.rank)
    usual = counts.most_common(1)[0][0] if counts else 1
    fixed = asked.fixed(wide=False)
    return float(min(fixed, usual or 1) if fixed else usual or 1)


def _planned(work: Work, inputs: _merged.Inputs) -> tuple[dict[Target, int], dict[Target, float]]:
    """Ranks that depend on all modules, and the norms that directions were scored against."""
    seeing = Seeing(work.asked, work.form.place)
    seen: dict[Target, Seen] = each_module(work, seeing, SEEING, ranks={}, scored=True)
    known = {target: Known(work.modules[target], *each) for target, each in seen.items()}
    shapes = {target: each.spectrum.shape for target, each in known.items()}
    costs = {target: cost(each.module, shapes[target], work.form) for target, each in known.items()}

    def measure(ranks: Mapping[Target, int]) -> int:
        made = {
            target: shaped(work.modules[target], rank, shapes[target], work.form)
            for target, rank in ranks.items()
        }
        return files.size(_assembled(work, made, inputs))

    ranks = _resize_ranks.together(work.asked, known, costs=costs, measure=measure)
    return ranks, {target: each.norm for target, each in known.items() if each.norm is not None}


def _cut(work: Work, ranks: Mapping[Target, int], form: Form) -> dict[Target, Resized]:
    """Every module at its rank: one that was planned, or the one that it needs by itself."""
    cutting = Cutting(work.asked, form)
    made: dict[Target, Made] = each_module(work, cutting, CUTTING, ranks=ranks, progress=work.progress)
    return {target: each.whole(work.modules[target]) for target, each in made.items()}


def _assembled(work: Work, made: Mapping[Target, Module], inputs: _merged.Inputs) -> Adapter:
    """The adapter with new modules in the place of those that were cut, in the file's order."""
    given = work.adapter
    modules = {
        target: made.get(target, module)
        for target, module in given.modules.items()
        if target in made or target not in work.modules
        if not (work.asked.conv_rank == 0 and module.kind != "full" and has_kernel(module))
    }
    if work.asked.dtype:
        modules = {target: files.cast_module(module, work.asked.dtype) for target, module in modules.items()}
    return Adapter(
        modules=modules,
        extras=given.extras,
        metadata=_resize_report.metadata(given, work.asked, inputs),
        arch=given.arch,
        layout=_resize_layout.present(given),
        config=_merged.config([given], modules, given.extras),
    )
