"""Which architecture a file's names are of.

The table that explains most names wins, if it explains at least three quarters of them: relatives share half.
Architectures that explain as many are told apart by widths, then by metadata, which can be wrong: it decides only
what names and widths leave open. Where no table does, markers in the paths choose an architecture whose paths are
their own names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from loratools.archs._arch import Arch, Resolved
from loratools.archs._table import parse
from loratools.model import EMPTY
from loratools.registry import scan

UNKNOWN = "unknown"


class Detection(NamedTuple):
    """The architecture found, and what its names mean.

    Attributes:
        arch: Its name; "unknown" if there is none, or several that nothing tells apart.
        candidates: Those that nothing tells apart.
        coverage: The fraction of the names that it explains, or that each of the candidates does.
        notes: What a reader should know, in sentences.
        resolved: What each stem means; stems that the architecture does not explain are absent.
    """

    arch: str
    candidates: tuple[str, ...] = ()
    coverage: float = 0.0
    notes: tuple[str, ...] = ()
    resolved: Mapping[str, Resolved] = EMPTY


# Components of an image or video pipeline: its text encoders do not make it a language model.
_PIPELINE = (
    "unet.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
    "diffusion_model.",
    "text_encoders.",
)


# How diffusers names the parts of its transformers, which no language model does.
_IMAGE = (".attn1.to_", ".attn2.to_", ".attn.to_q", ".ff.net.", ".ffn.net.")


class _Stem(NamedTuple):
    text: str
    skeleton: str
    numbers: tuple[str, ...]


def detect(
    stems: Mapping[str, tuple[int, int] | None], metadata: Mapping[str, str], base_model: str = ""
) -> Detection:
    """Find the architecture of a file.

    Args:
        stems: The keys without their factor suffixes, and the (out, in) widths of their weights where known.
        metadata: The file's string metadata.
        base_model: The base model's name, where the file's configuration states one.
    """
    parsed = [_Stem(stem, *parse(stem)) for stem in stems]
    explained = _explain(parsed)
    most = len(next(iter(explained.values()), ()))
    if most < len(stems) or base_model:
        marked, marks = _marked(parsed, base_model)
        if marked is not None and (marks > most or (marks == most and _is_named(marked, base_model))):
            return _by_identity(marked, stems, marks / len(stems), metadata, base_model)
    if not most:
        return _by_identity(_archs()[UNKNOWN], stems, 0.0, metadata, base_model)
    return _by_table(explained, stems, metadata, base_model)


def _archs() -> Mapping[str, Arch]:
    return scan("loratools.archs", "ARCH")


def _explain(stems: Sequence[_Stem]) -> dict[str, dict[str, Resolved]]:
    """The architectures that explain most stems, and at least three quarters, with what each stem means."""
    skeletons = Counter(stem.skeleton for stem in stems)

    def hope(known: Callable[[str], bool]) -> int:
        return sum(count for skeleton, count in skeletons.items() if known(skeleton))

    # The most promising one first: what it explains spares building the others' indices.
    hopes = {name: hope(arch.may_know) for name, arch in _archs().items() if arch.has_table}
    most = max(1, -(-3 * len(stems) // 4))
    best: dict[str, dict[str, Resolved]] = {}
    for name in sorted(hopes, key=lambda name: -hopes[name]):
        if hopes[name] < most:
            break
        arch = _archs()[name]
        resolved = _resolve(arch, stems, at_least=most) if hope(arch.knows) >= most else {}
        if len(resolved) > most:
            best, most = {}, len(resolved)
        if len(resolved) == most:
            best[name] = resolved
    return best


def _resolve(arch: Arch, stems: Sequence[_Stem], at_least: int) -> dict[str, Resolved]:
    """What the stems mean; nothing if fewer than ``at_least`` mean something."""
    resolved: dict[str, Resolved] = {}
    may_miss = len(stems) - at_least
    for stem in stems:
        meaning = arch.resolve_parsed(stem.text, stem.skeleton, stem.numbers)
        if meaning is not None:
            resolved[stem.text] = meaning
        elif may_miss:
            may_miss -= 1
        else:
            return {}
    return resolved


def _marked(stems: Sequence[_Stem], base_model: str) -> tuple[Arch | None, int]:
    """The architecture whose markers explain most stems, and how many; none if they explain less than half.

    A stem belongs to the longest marker found in it. Architectures that share it are told apart by the base
    model's name; the first one stands for the others, as language models are the most common.
    """
    if any(stem.text.startswith(_PIPELINE) or any(part in stem.text for part in _IMAGE) for stem in stems):
        return None, 0
    marked = [arch for arch in _archs().values() if arch.markers]
    counts: Counter[str] = Counter()
    for path, count in Counter(_numberless(stem.text) for stem in stems).items():
        lengths = {arch.name: _longest_marker(arch, path) for arch in marked}
        longest = max(lengths.values())
        counts.update({name: count for name, length in lengths.items() if length and length == longest})
    most = max(counts.values(), default=0)
    if not most or 2 * most < len(stems):
        return None, most
    tied = [arch for arch in marked if counts[arch.name] == most]
    hinted = [arch for arch in tied if _is_named(arch, base_model)]
    return (hinted or tied)[0], most


def _numberless(path: str) -> str:
    """A path with "#" for its numbers, between dots. A flattened name is one segment, which no marker is."""
    return f".{'.'.join(['#' if part.isdigit() else part for part in path.split('.')])}."


def _longest_marker(arch: Arch, path: str) -> int:
    """The length, in segments, of the longest marker in a path."""
    return max((mark.count(".") - 1 for mark in arch.marks if mark in path), default=0)


def _by_identity(
    arch: Arch,
    stems: Mapping[str, object],
    coverage: float,
    metadata: Mapping[str, str],
    base_model: str,
    notes: tuple[str, ...] = (),
) -> Detection:
    resolved = {stem: meaning for stem in stems if (meaning := arch.resolve(stem)) is not None}
    notes += tuple(
        f"{source} says {value} ({said.name}), but the names are not those of {said.name}"
        for source, value, said in _claims(metadata, base_model)
        if said is not arch
    )
    return Detection(arch.name, (), coverage, notes, resolved)


def _denied(
    arch: Arch, explained: Mapping[str, Resolved], stems: Mapping[str, tuple[int, int] | None]
) -> str:
    """The first name, known or not, of a weight that this architecture cannot have; empty if there is none."""
    for stem, shape in stems.items():
        meaning = explained.get(stem)
        if arch.denies(meaning, shape) if meaning is not None else any(word in stem for word in arch.foreign):
            return stem
    return ""


def _by_table(
    explained: Mapping[str, Mapping[str, Resolved]],
    stems: Mapping[str, tuple[int, int] | None],
    metadata: Mapping[str, str],
    base_model: str,
) -> Detection:
    """Choose among the architectures that explain the names equally well."""
    contenders = [_archs()[name] for name in explained]
    denied = {arch.name: _denied(arch, explained[arch.name], stems) for arch in contenders}
    contenders = [arch for arch in contenders if not denied[arch.name]]
    if not contenders:
        notes = tuple(
            f"the names are like those of {name}, but {stem} cannot be one of its weights"
            for name, stem in denied.items()
        )
        return _by_identity(_archs()[UNKNOWN], stems, 0.0, metadata, base_model, notes)
    told_by = "its names and widths" if len(contenders) < len(denied) else "its names"
    if len(contenders) > 1:
        fitting = _by_width(contenders, explained, stems)
        if len(fitting) < len(contenders):
            contenders, told_by = fitting, "its names and widths"
    claims = list(_claims(metadata, base_model))
    if len(contenders) > 1:
        for source, _, said in claims:
            if said in contenders:
                contenders, told_by = [said], source
                break
    coverage = len(explained[contenders[0].name]) / len(stems)
    if len(contenders) > 1:
        names = tuple(sorted(arch.name for arch in contenders))
        note = f"the names fit {' and '.join(names)} alike, and neither widths nor metadata tell them apart"
        unknown = _archs()[UNKNOWN]
        resolved = {stem: meaning for stem in stems if (meaning := unknown.resolve(stem)) is not None}
        return Detection(UNKNOWN, names, coverage, (note,), resolved)
    arch = contenders[0]
    notes = _unexplained(arch, stems, explained[arch.name]) + tuple(
        f"{source} says {value} ({said.name}), but by {told_by} it is {arch.name}"
        for source, value, said in claims
        if said is not arch
    )
    return Detection(arch.name, (), coverage, notes, explained[arch.name])


def _unexplained(arch: Arch, stems: Mapping[str, object], explained: Mapping[str, object]) -> tuple[str, ...]:
    """A note on the names that the architecture found does not have."""
    rest = [stem for stem in stems if stem not in explained]
    if not rest:
        return ()
    return (f"{len(rest)} of {len(stems)} names are not those of {arch.name} (first: {rest[0]})",)


def _by_width(
    contenders: Sequence[Arch],
    explained: Mapping[str, Mapping[str, Resolved]],
    stems: Mapping[str, tuple[int, int] | None],
) -> list[Arch]:
    """The contenders whose width rules the most weights fulfil; all of them where no weight fulfils any.

    A width that no rule knows (a tiny model's) is no evidence against anything.
    """
    votes = dict.fromkeys(explained, 0)
    for arch in contenders:
        sizes = {rule.size for rule in arch.widths}
        for stem, meaning in explained[arch.name].items():
            width = stems[stem]
            if width is not None and width[1] in sizes:
                votes[arch.name] += any(
                    rule.size == width[1] and rule.speaks_of(meaning) for rule in arch.widths
                )
    most = max(votes.values())
    return [arch for arch in contenders if votes[arch.name] == most]


def _claims(metadata: Mapping[str, str], base_model: str) -> Iterator[tuple[str, str, Arch]]:
    """What the metadata says that the architecture is, the most reliable source first."""
    version = metadata.get("ss_base_model_version", "").lower()
    spec = metadata.get("modelspec.architecture", "").lower().partition("/")[0]
    model = metadata.get("ss_sd_model_name", "")
    for arch in _archs().values():
        if version and version in arch.kohya_versions:
            yield "ss_base_model_version", version, arch
    for arch in _archs().values():
        if spec and spec in arch.modelspec:
            yield "modelspec.architecture", spec, arch
    for source, name in (("the base model's name", base_model), ("ss_sd_model_name", model)):
        for arch in _archs().values():
            if name and arch.has_table and _is_named(arch, name):
                yield source, name, arch


def _is_named(arch: Arch, model: str) -> bool:
    words = "-" + re.sub(r"[^a-z0-9]", "-", model.lower())
    return any("-" + part in words for part in arch.base_models)
