"""Adapters baked into a base checkpoint: W + Σ wᵢ · ΔWᵢ, one tensor at a time; all else is copied by the system.

Memory is bounded by the largest weight, not by the model. The copying begins before torch is imported and goes on while
tensors are computed; nothing has its final name before all of it is on the disk.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from loratools.errors import OptionError
from loratools.io import unchanged
from loratools.io.base import Base, keys_of
from loratools.io.uploading import uploads
from loratools.model import Adapter
from loratools.ops import _bake_beside, _bake_output, _locate, files
from loratools.ops._bake_output import Planned
from loratools.ops._bake_run import Meter, Options, Progress
from loratools.ops._bake_shards import shard_plans
from loratools.ops._changes import Plan
from loratools.ops._outputs import PICKLES, PathLike, check_output
from loratools.ops._strengths import strengths
from loratools.ops._unmapped import unmapped
from loratools.ops.checkpoint_results import BakedTensor, BakeEstimate, BakeReport

if TYPE_CHECKING:
    from loratools.engine import Engine

ROUNDINGS = ("nearest", "stochastic", "compensated")


@uploads
@unchanged.watched
def bake(
    base: PathLike,
    adapters: Sequence[PathLike | Adapter],
    output: PathLike,
    *,
    weights: Sequence[float] | None = None,
    components: Collection[str] | None = None,
    precise: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    resume: bool = False,
    skip_missing: bool = False,
    arch: str | None = None,
    dtype: str = "keep",
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> BakeReport:
    """Write a checkpoint with adapters in it.

    Args:
        base: The checkpoint: a file, a sharded model's folder or index, or a diffusers folder.
        adapters: Paths, or from ``load``.
        output: A file where the base is one, else a folder.
        weights: What each ΔW is multiplied by; default 1 each.
        components: Only these ("denoiser", "text_encoder", …); default: all.
        precise: Compute in float64 instead of float32.
        rounding: To the store dtype: "nearest", "stochastic" (unbiased), or "compensated" (to nearest, then corrected
            in the adapters' own subspace).
        seed: Of stochastic rounding.
        resume: Go on with a bake of the same inputs and options that was interrupted, and keep what is done if this one
            is.
        skip_missing: Leave out modules that the base has no weight for.
        arch: The architecture, overriding detection.
        dtype: The store dtype: "float32", "float16", "bfloat16", or "keep".
        device: Where to compute: "auto", "cpu", "cuda", "cuda:N" or "mps".
        threads: How many tensors are worked on side by side, a count; default: one per processor.
        overwrite: Whether an existing output may be replaced; it may be the base itself.
        dry_run: Plan, estimate, and write nothing.
        progress: Called with a tensor's name, the bytes done and the bytes of all.
        engine: Where the work is done; default: this machine's threads.

    Raises:
        LoraError: Nothing was written under the output's name.
    """
    started = time.perf_counter()
    _check_options(rounding, dtype)
    options = Options(
        precise=precise,
        rounding=rounding,
        seed=seed,
        device=device,
        store=None if dtype == "keep" else files.STORE_DTYPES[dtype],
        threads=threads,
    )
    found = keys_of(base)
    container = _container(found, os.fspath(output))
    check_output(output, overwrite=overwrite)
    loaded = tuple(
        each if isinstance(each, Adapter) else unmapped(files.bakeable(each, arch=arch)) for each in adapters
    )
    multiplied = strengths(weights, len(loaded))
    plan = _locate.plan(
        found, loaded, multiplied, arch=arch, components=components, skip_missing=skip_missing
    )
    name = os.path.basename(os.fspath(output))
    shards = shard_plans(found, plan, container=container, store=options.store, name=name)
    planned = Planned(
        found, loaded, multiplied, plan, tuple(shards), options, container, os.fspath(output), engine
    )
    planned = planned._replace(
        replaced=_bake_beside.replaced(found, [shard.name for shard in shards], planned.output)
    )
    if dry_run:
        from loratools.ops._bake_estimate import estimate

        planning = time.perf_counter() - started
        found_out = estimate(shards, options, planned.output, planning=planning, engine=engine)
        return _report(planned, [], started, estimate=found_out)
    meter = Meter(planned.bytes, progress)
    result = _bake_output.write(planned, meter, overwrite=overwrite, resume=resume)
    reason = result.fresh_reason
    notes = (f"nothing to resume: {reason}",) if resume and reason else ()
    report = _report(planned, result.done.tensors, started)
    return report._replace(
        bytes=result.bytes,
        beside=result.beside,
        resumed=result.done.taken,
        resumed_bytes=result.done.taken_bytes,
        notes=(*report.notes, *notes),
    )


def _check_options(rounding: str, dtype: str) -> None:
    if rounding not in ROUNDINGS:
        raise OptionError(f"there is no rounding {rounding!r}", candidates=ROUNDINGS)
    if dtype != "keep" and dtype not in files.STORE_DTYPES:
        raise OptionError(f"there is no store dtype {dtype!r}", candidates=[*files.STORE_DTYPES, "keep"])


def _container(base: Base, output: str) -> str:
    """The container of the output.

    Raises:
        OptionError: A folder for a file or the other way round, or a container that is not written.
    """
    suffix = os.path.splitext(output)[1].lower()
    named = suffix in (".safetensors", *PICKLES)
    if base.folder:
        if named or os.path.isfile(output):
            raise OptionError(
                "the base is a folder, and the output has a file's name",
                path=output,
                expected="A folder is written as a folder, with the same files",
                todo="Give a folder's name",
            )
        return base.shards[0].container
    if not named or os.path.isdir(output):
        raise OptionError(
            "the base is a file, and the output has no file's name",
            path=output,
            todo="Give a name that ends in .safetensors"
            + (f" or {PICKLES[0]}" if base.shards[0].container == "pickle" else ""),
        )
    if suffix in PICKLES and base.shards[0].container != "pickle":
        raise OptionError(
            f"a {suffix} is written from a {suffix} alone",
            path=output,
            todo="Give a name that ends in .safetensors",
        )
    return "pickle" if suffix in PICKLES else "safetensors"


def _report(
    planned: Planned, baked: list[BakedTensor], started: float, *, estimate: BakeEstimate | None = None
) -> BakeReport:
    plan, options = planned.plan, planned.options
    tensors = tuple(baked) if estimate is None else _planned(plan)
    changed = [change.weight for change in plan.changes]
    count = sum(len(shard.weights) for shard in planned.shards)
    return BakeReport(
        base=planned.base.path,
        output=planned.output,
        adapters=tuple(adapter.path for adapter in planned.adapters),
        weights=planned.strengths,
        arch=plan.arch,
        container=planned.container,
        bytes=planned.bytes,
        files=len(planned.shards),
        beside=planned.base.beside,
        tensors=tensors,
        copied=count - len(changed),
        changed_bytes=sum(weight.nbytes for weight in changed),
        matched=plan.matched,
        missing=plan.missing,
        left_out=plan.left_out,
        rounding=options.rounding,
        precise=options.precise,
        kept=_kept(tensors) if estimate is None else None,
        error=_error(tensors) if estimate is None else None,
        seconds=time.perf_counter() - started,
        estimate=estimate,
        notes=(*plan.notes, *_bake_beside.notes(planned.base, planned.replaced)),
    )


def _planned(plan: Plan) -> tuple[BakedTensor, ...]:
    """The tensors that would change, of which nothing was computed yet."""
    return tuple(
        BakedTensor(
            change.weight.key,
            change.target,
            change.component,
            change.weight.shape,
            change.weight.dtype,
            tuple(dict.fromkeys(term.adapter for term in change.terms)),
            0.0,
            None,
            None,
        )
        for change in plan.changes
    )


def _kept(tensors: Sequence[BakedTensor]) -> float | None:
    """How much of ΔW is in the result, over all tensors."""
    told = [each for each in tensors if each.kept is not None and each.norm]
    whole = sum(each.norm**2 for each in told)
    return sum((each.kept or 0.0) * each.norm**2 for each in told) / whole if whole else None


def _error(tensors: Sequence[BakedTensor]) -> float | None:
    """What rounding added, relative to ‖ΔW‖ over all tensors."""
    told = [each for each in tensors if each.error is not None and each.norm]
    whole = sum(each.norm**2 for each in told)
    return math.sqrt(sum(((each.error or 0.0) * each.norm) ** 2 for each in told) / whole) if whole else None
