"""A library of adapters of one base as one folder for batched serving: checked, in one form, without duplicates.

Batched serving (S-LoRA, arXiv 2311.03285) multiplies one batch by many adapters at once, which wants them in one layout
and dtype, at few ranks, with the scale in the factors. Every adapter is one folder (or file) of the pack, which a
program loads by its path, and ``index.json`` says of each what it is and where it came from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from loratools.engine import local
from loratools.errors import OptionError
from loratools.ops import _pack_index, _pack_inputs, convert, files
from loratools.ops._pack_fit import Fit, program
from loratools.ops._pack_plan import Request
from loratools.ops._pack_run import Run
from loratools.ops._pack_shared import Shared
from loratools.ops._pack_work import Work, check_output
from loratools.ops.pack_results import PackReport

Progress = Callable[[str, int, int], None]


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
    progress: Progress | None = None,
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
        progress: Called with an adapter's name, how many are done and how many there are.

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
    options = {**request._asdict(), "runtime": runtime, "max_rank": max_rank, "same": duplicate_error}
    fit = Fit(request.layout, served, request.base, max_rank or 0)
    with Work(output, options, resume=resume, dry=dry_run) as work:
        run = Run(request, fit, work, duplicate_error, skip_unfit, written=shared_basis is None)
        # In order, and with one thread for the algebra: the matrices are too small to be shared out.
        for number, _ in enumerate(local.run(run.take, found, threads=1), 1):
            if progress is not None:
                progress(found[number - 1].name, number, len(found))
        run.settle(len(found))
        report = run.report(os.fspath(output), runtime)
        more: dict[str, Any] = {}
        if shared_basis is not None:
            shared = Shared(
                report.adapters, run.shapes_of, shared_basis, diagonal, run.planner, request.dtype
            )
            report, more["shared_basis"] = shared.compressed(report, work.folder, progress)
        work.publish(_index(report, run.arch, more), [each.path for each in report.adapters])
    return report


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
