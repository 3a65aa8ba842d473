"""A library of adapters of one base as one folder for batched serving: checked, in one form, without duplicates.

Batched serving (S-LoRA, arXiv 2311.03285) multiplies one batch by many adapters at once, which wants them in one layout
and dtype, at few ranks, with the scale in the factors. Every adapter is one folder (or file) of the pack, which a
program loads by its path, and ``index.json`` says of each what it is and where it came from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from loratools.engine import Engine, Plan
from loratools.engine.local import Local
from loratools.engine.ordered import in_order
from loratools.errors import OptionError
from loratools.io import unchanged
from loratools.io.uploading import uploads
from loratools.ops import _pack_index, _pack_inputs, _prediction, convert, files
from loratools.ops._pack_fit import Fit, program
from loratools.ops._pack_inputs import Source
from loratools.ops._pack_make import Made, Making, item, make
from loratools.ops._pack_plan import Request
from loratools.ops._pack_run import Run
from loratools.ops._pack_shared import Shared
from loratools.ops._pack_work import Work, check_output, identity
from loratools.ops.pack_results import PackReport

Progress = Callable[[str, int, int], None]


@uploads
@unchanged.watched
def pack(
    libraries: Sequence[files.PathLike],
    output: files.PathLike,
    *,
    layout: str | None = None,
    runtime: str | None = None,
    max_rank: int | None = None,
    ranks: Sequence[int] = (),
    dtype: str = "keep",
    base: files.PathLike | None = None,
    arch: str | None = None,
    duplicate_error: float | None = None,
    shared_basis: int | None = None,
    diagonal: bool = False,
    skip_unfit: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> PackReport:
    """Write a pack.

    Args:
        libraries: Adapters, or folders in which they lie at any depth; all of one base model.
        output: The pack, a folder.
        layout: Of its adapters; default: the program's, or "peft".
        runtime: The program that is to serve them: "vllm", "sglang", "lorax", …; each is checked for it.
        max_rank: The program's limit of the rank, a count; default: its usual one.
        ranks: The ranks to pad to, counts; default: each adapter's largest.
        dtype: The store dtype: "float32", "float16", "bfloat16", or "keep" for each adapter's own.
        base: The base model: names and shapes are checked against it.
        arch: The architecture, overriding detection.
        duplicate_error: The relative difference of a module's ΔW up to which two adapters are one; default: what
            rounding to their dtypes explains; 0: all are kept.
        shared_basis: Instead of adapters, one basis of at most this rank for each module, and a core for each adapter.
        diagonal: With a shared basis: cores that are diagonal.
        skip_unfit: Leave out what does not fit, and list it; else it is refused.
        resume: Go on with an interrupted run, and leave what is finished where this one is interrupted.
        overwrite: Whether an older pack may be replaced.
        dry_run: Do everything but write.
        threads: How many adapters are worked on side by side, a count; default: one per processor.
        progress: Called with an adapter's name, how many are done and how many there are.
        engine: Where adapters are read and written; default: this machine's threads.

    Raises:
        LoraError: Something does not fit, or cannot be read or written; no pack was written.
    """
    served = program(runtime)
    request = Request(
        convert.writable(layout or (served.layouts[0] if served is not None else "peft")).name,
        tuple(sorted(set(ranks))),
        _store(dtype),
        os.fspath(base) if base is not None else "",
        arch,
    )
    _check(request, shared_basis, diagonal, max_rank, runtime)
    check_output(output, overwrite=overwrite or dry_run, resume=resume)
    found = _pack_inputs.sources(libraries)
    for each in found:  # here: what reads them may be at work elsewhere
        unchanged.note(each.path)
        unchanged.note(os.path.join(os.path.dirname(each.path), files.CONFIG))
    options = {**request._asdict(), "runtime": runtime, "max_rank": max_rank, "same": duplicate_error}
    seen = None
    if dry_run:
        paths = [each.path for each in found]
        seen = _prediction.foreseeing(engine, threads, inputs=paths, output=output)
    fit = Fit(request.layout, served, request.base, max_rank or 0)
    told = partial(identity, options, request.base)
    with Work(output, told, resume=resume, overwrite=overwrite, dry=dry_run) as work:
        folder = os.fspath(work.folder) if work.folder is not None else ""
        making = Making(request, runtime, max_rank or 0, folder, named=shared_basis is None)
        run = Run(making, fit, work, duplicate_error, skip_unfit=skip_unfit)
        _take(run, making, found, seen or engine or Local(threads), progress)
        run.settle(len(found))
        report = run.report(os.fspath(output), runtime)
        more: dict[str, Any] = {}
        if shared_basis is not None:
            shared = Shared(
                report.adapters, run.shapes_of, shared_basis, diagonal, run.planner, request.dtype
            )
            report, more["shared_basis"] = shared.compressed(report, work.folder, progress)
        work.publish(_index(report, run.arch, more), [each.path for each in report.adapters])
    if seen is not None:
        report = report._replace(estimate=_prediction.foreseen(seen, engine, threads))
    return report


def _take(
    run: Run, making: Making, found: Sequence[Source], engine: Engine, progress: Progress | None
) -> None:
    """Make the adapters in any order, and take them one after the other in theirs."""
    left = [source for source in found if not run.finished(source)]
    plan = Plan(partial(make, making), left, [item(source) for source in left])
    results = in_order(_noted(run, left, engine.run(plan)))
    waiting = {source.path for source in left}
    for number, source in enumerate(found, 1):
        run.take(source, next(results) if source.path in waiting else None)
        if progress is not None:
            progress(source.name, number, len(found))


def _noted(
    run: Run, sources: Sequence[Source], results: Iterator[tuple[int, Made]]
) -> Iterator[tuple[int, Made]]:
    for number, made in results:
        run.note(sources[number], made)
        yield number, made


def _store(dtype: str) -> str:
    if dtype != "keep" and dtype not in files.STORE_DTYPES:
        raise OptionError(f"there is no store dtype {dtype!r}", candidates=[*files.STORE_DTYPES, "keep"])
    return files.STORE_DTYPES.get(dtype, "")


def _check(
    request: Request, shared: int | None, diagonal: bool, max_rank: int | None, runtime: str | None
) -> None:
    if any(rank < 1 for rank in request.ranks) or (shared is not None and shared < 1):
        raise OptionError("a rank below 1", expected="Ranks are counts of at least 1")
    if diagonal and shared is None:
        raise OptionError("cores are asked for, but no shared basis", todo="Add --shared-basis R")
    if shared is not None and request.ranks:
        raise OptionError(
            "a shared basis has one rank, and --ranks names others", todo="Leave out one of the two"
        )
    if max_rank is not None and runtime is None:
        raise OptionError("a limit of the rank is given, but no program", todo="Add --for")


def _index(report: PackReport, arch: str, more: dict[str, Any]) -> str:
    """The text of the index."""
    return _pack_index.text(
        {
            "layout": report.layout,
            "arch": arch,
            "for": report.runtime or None,
            "bytes": report.bytes,
            "adapters": [_pack_index.said(each) for each in report.adapters],
            "aliases": [each._asdict() for each in report.aliases],
            "unfit": [each._asdict() for each in report.unfit],
            "notes": list(report.notes),
            **more,
        }
    )
