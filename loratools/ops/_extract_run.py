"""Doing an extraction that was planned: decompose, keep on the disk, spend a size, spell, write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

from loratools import formats
from loratools.engine import Engine, local
from loratools.engine.kept import Kept
from loratools.errors import LayoutError, OptionError
from loratools.model import Adapter
from loratools.ops import (
    _extract_identity,
    _extract_on,
    _extract_report,
    _extract_size,
    _extract_write,
    files,
)
from loratools.ops._extract_jobs import Work, job_bytes
from loratools.ops._extract_modules import Extracted, modules
from loratools.ops._extract_on import RESULTS
from loratools.ops._extract_options import Options
from loratools.ops._extract_pairs import Stored
from loratools.ops._extract_plan import Compared
from loratools.ops._extract_side import Side
from loratools.ops._extract_tensor import FACTORS, FULL, Job
from loratools.ops.checkpoint_results import ExtractReport
from loratools.tensors import DTYPES

Progress = Callable[[str, int, int], None]


class Extraction(NamedTuple):
    """An extraction that was checked and planned.

    Attributes:
        base: The base.
        tuned: The tuned checkpoint.
        options: What is asked for.
        compared: What there is to compare.
        work: What is done with it.
        form: The layout.
        container: "safetensors" or "pickle".
        output: Where it is written; empty for an adapter in memory.
        device: Where it is computed.
        threads: How many matrices are worked on side by side, a count; None for one per processor.
        progress: Called with a name, bytes done and bytes in all.
        engine: Where it is computed instead; None for this machine.
        resume: Whether an interrupted run is gone on with.
    """

    base: Side
    tuned: Side
    options: Options
    compared: Compared
    work: Work
    form: formats.Format
    container: str
    output: str
    device: str
    threads: int | None
    progress: Progress | None
    engine: Engine | None = None
    resume: bool = False


def run(planned: Extraction, *, overwrite: bool) -> tuple[Adapter | None, ExtractReport]:
    """Do it, and write or return what was found.

    Raises:
        LoraError: Nothing was written.
    """
    with _keeping(planned) as (planned, engine):
        kept, norms = _computed(planned)
        planned = _with_changed(planned, norms)
        if not kept:
            raise _nothing(planned)
        ranks = _ranks(planned, kept)
        found = adapter_of(planned, list(kept.values()), ranks)
        report = _extract_report.report(planned, kept, ranks, norms)
        if not planned.output:
            return _in_memory(found, planned.form), report
        document, notes = _document(found, planned.form)
        written = files.write(
            document, planned.form, planned.output, container=planned.container, overwrite=overwrite
        )
        said, taken = (engine.notes, engine.taken) if engine is not None else ((), 0)
        return None, report._replace(bytes=written, notes=(*report.notes, *notes, *said), resumed=taken)


def _nothing(planned: Extraction) -> OptionError:
    """The error for checkpoints that do not differ in anything that an adapter could be made of."""
    whole = len(planned.work.replaced)
    return OptionError(
        f"no weight that is extracted differs from {planned.base.base.path}",
        path=planned.tuned.base.path,
        expected=f"An adapter does not hold {whole} whole tensors alone" if whole else "",
        todo="--full-small and --embeddings extract more than matrices and convolutions",
    )


def _document(found: Adapter, form: formats.Format) -> tuple[formats.Document, tuple[str, ...]]:
    """What will be written, and what its reader should know; modules are fused or split as the layout has them."""
    spelt = _extract_write.spelt(found, form)
    return spelt.document, spelt.notes


def _in_memory(found: Adapter, form: formats.Format) -> Adapter:
    """An adapter as its layout has it; what the layout cannot hold is refused when it is saved, not before."""
    with suppress(LayoutError):
        found = replace(_extract_write.spelt(found, form).adapter, layout=found.layout, config=found.config)
    return found


def _with_changed(planned: Extraction, norms: Mapping[int, float]) -> Extraction:
    """The extraction with those whole tensors alone that differ."""
    pairs = planned.work.pairs
    whole = frozenset(number for number in planned.work.replaced if pairs[number].grown or norms[number])
    return planned._replace(work=planned.work._replace(replaced=whole))


@contextmanager
def _keeping(planned: Extraction) -> Iterator[tuple[Extraction, Kept | None]]:
    """The extraction with an engine that keeps results beside the output; as it is where there is none."""
    if not planned.output:
        yield planned, None
        return
    inner = planned.engine or local.Local(planned.threads)
    with Kept(
        inner, planned.output, lambda: _extract_identity.of(planned), RESULTS, resume=planned.resume
    ) as engine:
        yield planned._replace(engine=engine), engine


def _computed(planned: Extraction) -> tuple[dict[int, Extracted], dict[int, float]]:
    """The results by job number, in order; and the norm of every difference."""
    jobs = list(planned.work.jobs)
    if planned.options.kind == "size":
        itemsize = DTYPES[planned.work.dtype].bits // 8
        matrices = [job for job in jobs if job.task == FACTORS]
        limited = _extract_size.first_ranks(matrices, int(planned.options.value), itemsize)
        by_number = {job.number: job for job in limited}
        jobs = [by_number.get(job.number, job) for job in jobs]
    norms: dict[int, float] = {}
    kept = _results(planned, jobs, norms)
    return dict(sorted(kept.items())), norms


def _results(planned: Extraction, jobs: list[Job], norms: dict[int, float]) -> dict[int, Extracted]:
    by_number = {job.number: job for job in jobs}
    total, done = sum(job_bytes(job) for job in jobs), 0
    kept: dict[int, Extracted] = {}
    for found in _extract_on.run(planned.engine, jobs, planned.device, planned.threads):
        number = found.found.number
        job = by_number[number]
        norms[number] = found.found.norm
        if found.found.norm and job.task in (FACTORS, FULL):
            kept[number] = Extracted(planned.work.pairs[number].stored, *found)
        done += job_bytes(job)
        if planned.progress is not None:
            planned.progress(job.name, done, total)
    return kept


def _ranks(planned: Extraction, kept: dict[int, Extracted]) -> dict[int, int]:
    """The ranks that a size allows, by job number; none where another rule has decided."""
    low = {number: each for number, each in kept.items() if each.up is not None}
    if planned.options.kind != "size" or not low:
        return {}

    def measure(ranks: Mapping[int, int]) -> int:
        return size_of(planned, list({**kept, **low}.values()), ranks)

    def deepen(jobs: Iterable[Job]) -> dict[int, Extracted]:
        return _results(planned._replace(progress=None), list(jobs), {})

    jobs = {job.number: job for job in planned.work.jobs if job.number in low}
    least, budget = planned.options.least, int(planned.options.value)
    ranks = _extract_size.spend(low, jobs, budget, least, measure=measure, deepen=deepen)
    kept.update(low)
    return ranks


def adapter_of(planned: Extraction, kept: list[Extracted], ranks: Mapping[int, int]) -> Adapter:
    return _extract_write.adapter(
        modules(kept, ranks),
        _replaced(planned),
        planned.base.base,
        planned.tuned.base,
        planned.compared.arch,
        planned.form,
        planned.container,
        planned.options,
    )


def _replaced(planned: Extraction) -> list[Stored]:
    """The tuned tensors that go over whole."""
    pairs = (planned.work.pairs[number] for number in sorted(planned.work.replaced))
    return [pair.stored._replace(weight=pair.tuned[0].weight) for pair in pairs]


def size_of(planned: Extraction, kept: list[Extracted], ranks: Mapping[int, int] | None = None) -> int:
    """Bytes that would be written, for given ranks by job number.

    Raises:
        LayoutError: The layout cannot hold everything.
    """
    found = adapter_of(planned, kept, ranks or {})
    return files.document_size(_document(found, planned.form)[0], planned.form)
