"""How adapters relate: cosines, norms, distances, shared spaces and signs of their ΔW, from factors in float64.

Modules are brought to the targets that a merge of the same inputs would have, so that what is found is what would be
merged. An adapter that lacks a target is 0 there. Every figure over several targets is that of their ΔW side by side.

Two adapters or two hundred: each factor is read once, one target of all inputs is in memory at a time per thread, and
only products of (rank, rank) grow with the square of the number. Spaces, signs and single modules are for a few
adapters, of which every pair can be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from loratools import formats
from loratools.engine import Engine, Plan
from loratools.engine.local import Local
from loratools.engine.ordered import in_order
from loratools.errors import NonFiniteError, OptionError, UnsupportedKindError
from loratools.io import unchanged
from loratools.io.base import keys_of
from loratools.model import Adapter, Target
from loratools.ops import _compare_inputs, _compare_report, align
from loratools.ops._base_weights import Weights
from loratools.ops._compare_report import Collected
from loratools.ops._compare_target import Job, Task, bound, item, work
from loratools.ops._device import elsewhere, usable
from loratools.ops._outputs import PathLike
from loratools.ops.align import Contribution
from loratools.ops.compare_results import CompareReport

Progress = Callable[[str, int, int], None]

DETAILED = 16
"""The most adapters of which every pair is compared by spaces and signs."""
SAMPLED_ROWS = 64
"""How many rows of each ΔW the sign conflict rests on, where it need not be exact."""


@unchanged.watched
def compare(
    adapters: Sequence[Adapter | PathLike],
    *,
    weights: Sequence[float] | None = None,
    components: Collection[str] | None = None,
    modules: bool = False,
    suggest: bool = False,
    exact: bool = False,
    base: PathLike | None = None,
    arch: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> CompareReport:
    """Compare adapters of one architecture.

    Args:
        adapters: From ``load``, or paths; two at least. Rank, alpha, layout, dtype, kind and modules may differ.
        weights: What each ΔW is multiplied by; default 1 each.
        components: Only these ("denoiser", "text_encoder", …); default: all.
        modules: Whether to give the figures of every target, too, which is for at most 16 adapters.
        suggest: Whether to say which merge method suits them.
        exact: Whether the sign conflict rests on every element, not on 64 rows of each ΔW.
        base: The base model, for DoRA and the kinds whose ΔW depends on its weights.
        arch: The architecture, overriding detection.
        device: "auto", "cpu", "cuda", "cuda:N".
        threads: How many targets are worked on side by side, a count; default: one per processor.
        progress: Called with the target's name, its number and the count of all.
        engine: Where to compute; default: this machine's threads, or its ``device``.

    Raises:
        LoraError: They cannot be compared; the message says which and why.
    """
    found = _compare_inputs.inputs(adapters, components, arch)
    given = _compare_inputs.checked_weights(weights, len(adapters))
    detailed = len(adapters) <= DETAILED
    if modules and not detailed:
        raise OptionError(
            f"the figures of every module for {len(adapters)} adapters",
            expected=f"At most {DETAILED} adapters can be compared module by module",
            todo="Compare fewer, or leave --modules away",
        )
    common = _compare_inputs.common_arch(found.adapters)
    _compare_inputs.refuse(found.adapters, base)
    place = usable(device, wanted=torch.float64) if engine is None else elsewhere(device)
    held = Weights(keys_of(base), common) if base is not None else None
    if held is not None:
        found = found._replace(adapters=_compare_inputs.unpacked(found.adapters, held.base))
    targets = _targets(found.adapters, common)
    with held or nullcontext():
        rows = 0 if exact else SAMPLED_ROWS
        job = Job(given, held, place, detailed, rows=rows, angles=modules)
        collected = Collected(len(adapters), detailed=detailed, modules=modules)
        _run(job, targets, collected, engine or Local(threads), progress)
    _refuse_found(collected, found.adapters)
    return _compare_report.report(found, common, job, targets, collected, suggest=suggest)


def _targets(adapters: Sequence[Adapter], arch: str) -> dict[Target, list[Contribution]]:
    """The targets at the grain that a merge into the first adapter's layout has."""
    name = adapters[0].layout.name
    if name == "unknown":
        return align.align(adapters, arch, "native")
    form = formats.get(name)
    return align.align(adapters, arch, form.dialect, form.name)


def _run(
    job: Job,
    targets: Mapping[Target, Sequence[Contribution]],
    collected: Collected,
    engine: Engine,
    progress: Progress | None,
) -> None:
    tasks = [Task(target, tuple(brought)) for target, brought in targets.items()]
    plan = Plan(partial(work, job), tasks, [item(task) for task in tasks], bound)
    # Sums over targets are rounded: they are made in one order, whatever the order in which targets are done.
    for number, found in enumerate(in_order(engine.run(plan)), start=1):
        collected.add(found)
        if progress is not None:
            progress(str(found.target), number, len(targets))


def _refuse_found(collected: Collected, adapters: Sequence[Adapter]) -> None:
    """Refuse what only the tensors told.

    Raises:
        UnsupportedKindError: Modules that have no ΔW of two factors.
        NonFiniteError: NaN or Inf.
    """
    if collected.refused:
        source, _, problem = collected.refused[0]
        raise UnsupportedKindError(
            f"{len(collected.refused)} modules cannot be compared: {problem}",
            path=adapters[source].path or None,
            keys=[target for _, target, _ in collected.refused],
            expected="A ΔW for every module was expected: of DoRA and some kinds the base's weights are a part",
            todo="Give the base that the adapter was trained on with --base",
        )
    if collected.nonfinite:
        source = collected.nonfinite[0][0]
        names = dict.fromkeys(name for each, name in collected.nonfinite if each == source)
        raise NonFiniteError(
            f"{len(names)} tensors hold NaN or Inf",
            path=adapters[source].path or None,
            keys=names,
            expected="Finite factors were expected",
            todo="The file is damaged, or training diverged; get it again or train anew",
        )
