"""What an extraction found out, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratools.io.base import Weight, load, load_rows
from loratools.ops._extract_difference import norm_of, unlike
from loratools.ops._extract_modules import Extracted
from loratools.ops._extract_pairs import Pair, Stored
from loratools.ops._extract_tensor import FACTORS, FULL
from loratools.ops.checkpoint_results import ExtractedModule, ExtractReport, LeftOut

if TYPE_CHECKING:
    from loratools.ops._extract_run import Extraction

_FOREIGN = "outside the components that an adapter changes"


def report(
    planned: Extraction, kept: Mapping[int, Extracted], ranks: Mapping[int, int], norms: Mapping[int, float]
) -> ExtractReport:
    """The report of an extraction that was done; bytes and seconds are the caller's.

    Args:
        planned: What was done.
        kept: Results by job number.
        ranks: By job number, where fewer were kept than were computed.
        norms: ‖difference‖ by job number.
    """
    found = {number: _module(each, ranks.get(number)) for number, each in kept.items()}
    found |= {number: _whole(planned.work.pairs[number], norms[number]) for number in planned.work.replaced}
    taken = [job.number for job in planned.work.jobs if job.task in (FACTORS, FULL)]
    energy = sum(each.norm**2 for each in found.values())
    lost = sum((each.norm * each.error) ** 2 for each in found.values())
    least = sum((each.norm * each.optimum) ** 2 for each in found.values())
    return blank(planned)._replace(
        modules=tuple(found[number] for number in sorted(found)),
        unchanged=sum(not norms[number] for number in {*taken, *planned.work.replaced}),
        left_out=left_out(planned, norms),
        energy=1.0 - lost / energy if energy else 1.0,
        error=math.sqrt(lost / energy) if energy else 0.0,
        optimum=math.sqrt(least / energy) if energy else 0.0,
        notes=(*planned.compared.notes, *_remarks(planned, kept)),
    )


def blank(planned: Extraction) -> ExtractReport:
    """A report of what was asked for alone."""
    return ExtractReport(
        base=planned.base.base.path,
        tuned=planned.tuned.base.path,
        output=planned.output,
        arch=planned.compared.arch,
        layout=planned.form.name,
        rule=planned.options.text,
        bytes=0,
        dtype=planned.work.dtype,
        modules=(),
        unchanged=0,
        device=planned.device,
        notes=planned.compared.notes,
    )


def _module(kept: Extracted, rank: int | None) -> ExtractedModule:
    found, stored = kept.found, kept.stored
    full = kept.full is not None
    count = len(found.sigma) if rank is None else rank
    # Singular values beyond the rank are lost as well; what may be gained at best only shrinks with the rank.
    lost = found.lost + math.fsum(each**2 for each in found.sigma[count:])
    error, optimum = (math.sqrt(each / found.energy) for each in (lost, max(0.0, lost - found.gap)))
    return ExtractedModule(
        _name(stored),
        stored.target.component,
        "full" if full else "lora",
        stored.shape,
        None if full else count,
        found.norm,
        1.0 - error**2,
        error,
        optimum,
        found.method,
    )


def _name(stored: Stored) -> str:
    return f"{stored.target}.bias" if stored.leaf == "bias" else str(stored.target)


def _whole(pair: Pair, norm: float) -> ExtractedModule:
    """A tensor that goes over whole: nothing of it is lost."""
    stored, target = pair.stored, pair.stored.target
    return ExtractedModule(
        _name(stored), target.component, "full", stored.shape, None, norm, 1.0, 0.0, 0.0, "full"
    )


def left_out(planned: Extraction, norms: Mapping[int, float]) -> tuple[LeftOut, ...]:
    """Everything that differs and was not taken, with how large it is."""
    found: list[LeftOut] = []
    for job in planned.work.jobs:
        number = job.number
        if number in planned.work.why and norms[number]:
            found.append(LeftOut(job.name, planned.work.why[number], norms[number]))
        if number not in planned.work.replaced:
            found += _rows_alone(planned, planned.work.pairs[number])
    found += [LeftOut(each.weight.key, each.why, _size(each.weight)) for each in planned.compared.alone]
    for own, other in planned.compared.others:
        norm = unlike(own, other)
        if norm:
            found.append(LeftOut(own.key, _FOREIGN, norm))
    return tuple(found)


def _rows_alone(planned: Extraction, pair: Pair) -> list[LeftOut]:
    """The rows of a resized vocabulary that one checkpoint has alone."""
    key = pair.stored.weight.key
    lost = (pair.stored.shape[0] if pair.stored.shape else 1) - pair.rows
    if pair.grown:
        way = "" if pair.stored.is_small else "; with --embeddings, PEFT's layout holds the whole tensor"
        why = f"{pair.grown} new rows of a resized vocabulary{way}"
        return [LeftOut(key, why, _size(pair.tuned[0].weight, pair.rows, pair.grown))]
    if lost:
        why = f"{lost} rows of the vocabulary that {planned.tuned.base.path} does not have"
        return [LeftOut(key, why, _size(pair.stored.weight, pair.rows, lost))]
    return []


def _size(weight: Weight, start: int = 0, count: int | None = None) -> float:
    tensor = load(weight) if count is None else load_rows(weight, start, start + count)
    return norm_of(tensor.double().reshape(-1))


def _remarks(planned: Extraction, kept: Mapping[int, Extracted]) -> list[str]:
    tiny = [each.stored.weight.key for each in kept.values() if each.found.tiny]
    if not tiny:
        return []
    return [
        f"the factors of {len(tiny)} modules are smaller than {planned.work.dtype} holds with all its digits "
        f"(first: {tiny[0]}): --dtype float32 keeps them"
    ]
