"""What a comparison has found, collected target by target and put into a report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from loratools.errors import shown
from loratools.model import Adapter, Target
from loratools.ops import _compare_suggest
from loratools.ops._compare_inputs import Inputs
from loratools.ops._compare_sums import Sums, module_pair, pairs_of
from loratools.ops._compare_target import Job, TargetFigures
from loratools.ops._weights_of import least_precise
from loratools.ops.align import Contribution
from loratools.ops.compare_results import (
    ComparedAdapter,
    ComparedPair,
    CompareReport,
    ModulePair,
    Relation,
)
from loratools.tensors import DTYPES

# What converting between layouts and dtypes makes of ΔW: rounding of both factors, and again on the way there.
_ROUNDINGS = 4.0
# Tools compute in float32, which leaves several of its roundings whatever the store dtype.
_LEAST_TOLERANCE = 1e-6


class Collected:
    """What has been found so far.

    Attributes:
        count: How many inputs there are.
        overall: Sums over all targets.
        shared: How many targets both of a pair change.
        components: Sums over each component's.
        modules: By pair, where asked for.
        nonfinite: Keys by input.
        refused: Targets with what is wrong with them, by input.
    """

    def __init__(self, count: int, *, detailed: bool, modules: bool) -> None:
        self.count = count
        self._detailed = detailed
        self.overall = Sums(count)
        self.components: dict[str, Sums] = {}
        self.shared: Counter[tuple[int, int]] = Counter()
        self.modules: dict[tuple[int, int], list[ModulePair]] | None = {} if modules else None
        self.nonfinite: list[tuple[int, str]] = []
        self.refused: list[tuple[int, str, str]] = []

    def add(self, found: TargetFigures) -> None:
        """Take in a target."""
        self.nonfinite += found.nonfinite
        self.refused += [(source, str(found.target), problem) for source, problem in found.refused]
        if found.nonfinite or found.refused:
            return
        self.overall.add(found)
        self.components.setdefault(found.target.component, Sums(self.count)).add(found)
        if not self._detailed:
            return
        for first, second in pairs_of(self.count):
            self.shared[first, second] += first in found.members and second in found.members
            pair = module_pair(found, first, second) if self.modules is not None else None
            if self.modules is not None and pair is not None:
                self.modules.setdefault((first, second), []).append(pair)


def report(
    inputs: Inputs,
    arch: str,
    job: Job,
    targets: Mapping[Target, Sequence[Contribution]],
    collected: Collected,
    *,
    suggest: bool,
) -> CompareReport:
    """The report.

    Args:
        inputs: The adapters.
        arch: Their architecture.
        job: What was computed.
        targets: What was compared.
        collected: What was found.
        suggest: Whether to say which merge method suits them.
    """
    adapters = inputs.adapters
    overall = collected.overall
    norms = overall.norms()
    tolerances = [_tolerance(adapter) for adapter in adapters]
    pairs: list[ComparedPair] = []
    if job.detailed:
        pairs = [_pair(collected, pair, norms, tolerances) for pair in pairs_of(len(adapters))]
    distances, cosines = overall.distances(), overall.cosines()
    same = _groups(distances, tolerances)
    found = _compare_suggest.suggestion(norms, cosines, pairs, job.weights, same) if suggest else None
    return CompareReport(
        adapters=tuple(_adapters(adapters, job, targets, norms)),
        arch=arch,
        targets=len(targets),
        cosines=cosines,
        distances=distances,
        same=same,
        pairs=tuple(pairs),
        sampled_rows=job.rows if job.detailed else None,
        suggestion=found,
        notes=(*_zeros(norms), *_strangers(pairs), *_notes(inputs, job, wanted=suggest and found is None)),
    )


def _pair(
    collected: Collected, places: tuple[int, int], norms: Sequence[float], tolerances: Sequence[float]
) -> ComparedPair:
    first, second = places
    relation = collected.overall.relation(first, second)
    tolerance = max(tolerances[first], tolerances[second])
    energy = norms[first] ** 2
    return ComparedPair(
        first,
        second,
        shared=collected.shared[places],
        verdict=_verdict(relation, tolerance),
        multiple=float(collected.overall.gram[first, second]) / energy if energy else None,
        tolerance=tolerance,
        relation=relation,
        components={name: sums.relation(first, second) for name, sums in collected.components.items()},
        modules=tuple((collected.modules or {}).get(places, ())),
    )


def _verdict(relation: Relation, tolerance: float) -> str:
    if relation.cosine is None:
        return "zero"
    if relation.distance is not None and relation.distance <= tolerance:
        return "same"
    # What is left of one change once the other's nearest multiple is taken away is its sine.
    return "scaled" if math.sqrt(1.0 - relation.cosine**2) <= tolerance else "different"


def _tolerance(adapter: Adapter) -> float:
    """What rounding to the coarsest store dtype of the adapter's modules may make of a relative distance."""
    names = {least_precise(module) for module in adapter.modules.values()}
    units = [
        torch.finfo(getattr(torch, DTYPES[name].torch)).eps / 2.0 for name in names if DTYPES[name].torch
    ]
    return max(_LEAST_TOLERANCE, _ROUNDINGS * max(units, default=0.0))


def _groups(
    distances: Sequence[Sequence[float | None]], tolerances: Sequence[float]
) -> tuple[tuple[int, ...], ...]:
    """Adapters that are the same as the first of their group."""
    groups: list[list[int]] = []
    for index in range(len(distances)):
        for group in groups:
            distance = distances[group[0]][index]
            if distance is not None and distance <= max(tolerances[group[0]], tolerances[index]):
                group.append(index)
                break
        else:
            groups.append([index])
    return tuple(tuple(group) for group in groups if len(group) > 1)


def _adapters(
    adapters: Sequence[Adapter],
    job: Job,
    targets: Mapping[Target, Sequence[Contribution]],
    norms: Sequence[float],
) -> list[ComparedAdapter]:
    has: list[set[Target]] = [set() for _ in adapters]
    for target, contributions in targets.items():
        for each in contributions:
            has[each.source].add(target)
    return [
        ComparedAdapter(
            path=adapter.path,
            layout=str(adapter.layout),
            kinds=adapter.kinds,
            ranks=dict(sorted(Counter(module.rank or 0 for module in adapter.modules.values()).items())),
            weight=weight,
            targets=len(own),
            norm=norm,
            missing=tuple(str(target) for target in targets if target not in own),
        )
        for adapter, weight, own, norm in zip(adapters, job.weights, has, norms, strict=True)
    ]


def _zeros(norms: Sequence[float]) -> tuple[str, ...]:
    """What to say of adapters that change nothing, whose cosines are therefore left empty."""
    found = [str(number) for number, norm in enumerate(norms, start=1) if not norm]
    if not found:
        return ()
    verb = "changes" if len(found) == 1 else "change"
    return (f"{shown(found)} {verb} nothing (ΔW = 0, its weight included): no cosine is defined there",)


def _strangers(pairs: Sequence[ComparedPair]) -> tuple[str, ...]:
    """What to say of pairs that change nothing in common, which is seldom what whoever compares them expects."""
    apart = [f"{pair.first + 1} and {pair.second + 1}" for pair in pairs if not pair.shared]
    if not apart:
        return ()
    return (f"{shown(apart)} change no base weight in common: they may be for different base models",)


def _notes(inputs: Inputs, job: Job, *, wanted: bool) -> tuple[str, ...]:
    """What was not compared, and why."""
    modules = [module for adapter in inputs.adapters for module in adapter.modules.values()]
    biased = sum("up_bias" in module.factors or "diff_b" in module.factors for module in modules)
    extras = sum(len(adapter.extras) for adapter in inputs.adapters)
    found = [
        (inputs.vectors, f"{inputs.vectors} modules change norms or biases alone and were not compared"),
        (biased, f"the biases of {biased} modules were not compared"),
        (extras, f"{extras} tensors that belong to no module were not compared"),
        (not job.detailed, "overlap and sign conflict are not computed for so many adapters"),
        (wanted, "there is nothing to suggest: fewer than two adapters change anything"),
    ]
    return tuple(text for holds, text in found if holds)
