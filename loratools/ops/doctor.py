"""Whether an adapter would load and do what it should: what is wrong with it, why that matters, what mends it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from loratools import io, runtimes
from loratools.errors import IncompleteModuleError, LoraError, NotAnAdapterError, OptionError, ShapeError
from loratools.formats import _classify
from loratools.io import storage
from loratools.io._model_files import read_config
from loratools.io.base import Base, keys_of
from loratools.model import Adapter
from loratools.ops import _doctor_config as config
from loratools.ops import _doctor_keys as keys
from loratools.ops import _doctor_runtime, files
from loratools.ops import _doctor_scale as scale
from loratools.ops._doctor_case import Case
from loratools.ops.doctor_results import ERROR, INFO, WARNING, DoctorReport, Finding
from loratools.runtimes import Runtime
from loratools.tensors import TensorRef

Check = Callable[[Case], Iterator[Finding]]

_HEADER: tuple[Check, ...] = (keys.empty, keys.pairs, keys.prefixes, keys.malformed, keys.styles)
_READ: tuple[Check, ...] = (
    *(
        config.missing,
        config.ranks,
        config.targets,
        config.method,
        config.dora,
        config.whole,
        config.patterns,
    ),
    *(config.fields, config.mutated, config.beside),
    *(scale.unknown, scale.stale, scale.nonfinite, scale.mixed, scale.unclaimed, scale.notes),
)
_ORDER = {ERROR: 0, WARNING: 1, INFO: 2}
# What the reader stops at, and a check of the header then tells of all modules.
_TOLD_BETTER = ("incomplete-pairs",)
# What a failure to read is called.
_FAILURES: tuple[tuple[type[LoraError], str], ...] = (
    (NotAnAdapterError, "not-an-adapter"),
    (IncompleteModuleError, "incomplete-pairs"),
    (ShapeError, "shapes"),
)


def doctor(
    path: files.PathLike,
    *,
    base: files.PathLike | None = None,
    runtime: str | None = None,
    max_rank: int | None = None,
    arch: str | None = None,
    values: bool = True,
) -> DoctorReport:
    """What is wrong with an adapter, by itself, for a base, and for a program.

    Args:
        path: A file, or a folder that is an adapter. One that cannot be read is a finding, not an error.
        base: The base model that it is to be used with: a file or a folder.
        runtime: The program: "vllm", "sglang", "llama.cpp", "mlx", "peft", "diffusers", "comfyui", …
        max_rank: The program's limit of the rank, a count; default: its usual one.
        arch: The architecture, overriding detection.
        values: Whether to read the tensors for NaN, zeros and overflows; else the header alone.

    Raises:
        OptionError: There is no such program, or a limit without one.
    """
    _refuse_limit(max_rank, runtime)
    program = runtimes.get(runtime) if runtime is not None else None
    given = os.fspath(path)
    adapter, findings = _read(given, arch)
    found_base, more = _base(base)
    case = Case(
        given,
        _header(given),
        adapter.config if adapter is not None else _config(given),
        adapter,
        os.fspath(base) if base is not None else "",
        found_base,
        program,
        max_rank or 0,
    )
    return _report(case, [*findings, *more, *_checked(case, program, values=values)])


def _report(case: Case, findings: Sequence[Finding]) -> DoctorReport:
    return DoctorReport(
        case.path,
        case.layout,
        case.adapter.arch if case.adapter is not None else "unknown",
        case.runtime.name if case.runtime is not None else "",
        case.given_base,
        len(case.modules),
        tuple(sorted(_once(findings), key=lambda finding: _ORDER[finding.severity])),
    )


def _refuse_limit(max_rank: int | None, runtime: str | None) -> None:
    """Refuse a limit of the rank that is nobody's, or none.

    Raises:
        OptionError: It is such.
    """
    if max_rank is None:
        return
    if runtime is None:
        raise OptionError(
            f"a limit of the rank ({max_rank}) is given, but no program", todo="Name the program with --for"
        )
    if max_rank < 1:
        raise OptionError(
            f"the limit of the rank is {max_rank}", expected="A rank of at least 1 was expected"
        )


def _checked(case: Case, program: Runtime | None, *, values: bool) -> Iterator[Finding]:
    """All checks that the case has what they need for."""
    for check in _HEADER:
        yield from check(case)
    if case.adapter is None or not case.modules:
        return
    for check in _READ:
        yield from check(case)
    if case.base is not None:
        from loratools.ops import _doctor_base

        yield from _doctor_base.names(case)
        yield from _doctor_base.vocabulary(case)
    if values:
        from loratools.ops import _doctor_values

        yield from _doctor_values.check(case)
    if program is not None:
        yield from _doctor_runtime.checked(case, program)


def _read(given: str, arch: str | None) -> tuple[Adapter | None, list[Finding]]:
    """The adapter, or why there is none."""
    try:
        adapter = files.read(given, arch=arch)
    except (LoraError, OSError) as error:
        return None, [_failure(error)]
    if adapter.type not in ("adapter", "ia3"):
        return None, [_other(adapter)]
    return adapter, []


def _failure(error: LoraError | OSError) -> Finding:
    code = next((code for kind, code in _FAILURES if isinstance(error, kind)), "unreadable")
    if not isinstance(error, LoraError):
        return Finding(code, ERROR, str(error), "No program can read it")
    named = f" ({', '.join(error.keys[:2])})" if error.keys else ""
    expected = error.expected or "Programs stop at such a file, or leave the module out"
    return Finding(code, ERROR, f"{error.problem}{named}", expected, error.todo, keys=error.keys)


def _other(adapter: Adapter) -> Finding:
    title = _classify.TITLES.get(adapter.type, adapter.type)
    notes = f": {'; '.join(adapter.notes)}" if adapter.notes else ""
    return Finding(
        "not-an-adapter",
        ERROR,
        f"this is {title}, not a LoRA adapter{notes}",
        "Programs that load adapters stop at it, or load nothing",
        "`loratools info` describes it",
    )


def _base(given: files.PathLike | None) -> tuple[Base | None, list[Finding]]:
    """The base model's tensors, or why there are none."""
    if given is None:
        return None, []
    try:
        return keys_of(given), []
    except LoraError as error:
        why = "The adapter was not compared with it"
        return None, [
            Finding("base-unreadable", ERROR, f"{given}: {error.problem}", why, error.todo, keys=error.keys)
        ]


def _header(given: str) -> Mapping[str, TensorRef]:
    """The tensors of whatever can be read, even where they make no adapter."""
    try:
        file = (files.weights_of(given) or given) if storage.is_dir(given) else given
        return io.open_tensors(file).tensors
    except (LoraError, OSError):
        return {}


def _config(given: str) -> Mapping[str, Any]:
    """The configuration beside what could not be read as an adapter."""
    folder = given if storage.is_dir(given) else os.path.dirname(given)
    try:
        return read_config(folder, files.CONFIG)
    except LoraError:
        return {}


def _once(findings: Sequence[Finding]) -> list[Finding]:
    """The findings without the reader's where the header, with counts, says the same again."""
    by_code = {finding.code: finding for finding in findings}
    return [
        finding
        for finding in findings
        if finding.code not in _TOLD_BETTER or by_code[finding.code] is finding
    ]
