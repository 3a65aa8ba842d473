"""Which architecture a file's names are of.

The table that explains most names wins, if it explains at least three quarters of them: relatives share half.
Architectures that explain as many are told apart by shapes and block numbers, then by metadata, which can be
wrong: it decides only what the tensors leave open. What it leaves open too is unknown, with the candidates named.
Where no table explains the names, markers in the paths choose an architecture whose paths are their own names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from loratools.archs._arch import Arch, Resolved
from loratools.archs._catalog import CATALOG, entries
from loratools.archs._claims import Claim, claims, named
from loratools.archs._entry import Ends, ends
from loratools.archs._names import parse
from loratools.archs._relatives import told_apart
from loratools.model import EMPTY

UNKNOWN = "unknown"


class Detection(NamedTuple):
    """The architecture found, and what its names mean.

    Attributes:
        arch: Its name; "unknown" if there is none, or several that nothing tells apart.
        candidates: Those that nothing tells apart; the architecture is one of them, or unknown.
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
    said = claims(metadata, base_model)
    explained = _explain(parsed)
    most = len(next(iter(explained.values()), ()))
    if most < len(stems) or base_model or not _has_denoiser(explained):
        marked, marks = _marked(parsed, base_model)
        if marked and (marks > most or (marks == most and _is_bare(explained, said))):
            return _by_identity(marked, stems, marks / len(stems), said)
    if not most:
        return _by_identity(UNKNOWN, stems, 0.0, said)
    return _by_table(explained, stems, said)


def _explain(stems: Sequence[_Stem]) -> dict[str, dict[str, Resolved]]:
    """The architectures that explain most stems, and at least three quarters, with what each stem means."""
    skeletons = Counter(stem.skeleton for stem in stems)
    hopes: Counter[str] = Counter()
    for skeleton, count in skeletons.items():
        hopes.update(dict.fromkeys(_promising(skeleton), count))
    most = max(1, -(-3 * len(stems) // 4))
    best: dict[str, dict[str, Resolved]] = {}
    # The most promising one first: what it explains spares importing the others.
    for name, hope in hopes.most_common():
        if hope < most:
            break
        arch = CATALOG[name]
        known = sum(count for skeleton, count in skeletons.items() if arch.knows(skeleton))
        resolved = _resolve(arch, stems, at_least=most) if known >= most else {}
        if len(resolved) > most:
            best, most = {}, len(resolved)
        if len(resolved) == most:
            best[name] = resolved
    return {name: best[name] for name in sorted(best)}


def _promising(skeleton: str) -> set[str]:
    """The architectures that may have a name with this skeleton, as far as the index tells."""
    found = set()
    for prefix, readings in _readings().items():
        if skeleton.startswith(prefix):
            head, tail = ends(skeleton[len(prefix) :])
            found.update([name for name, (heads, tails) in readings if head in heads and tail in tails])
    return found


@cache
def _readings() -> dict[str, list[tuple[str, Ends]]]:
    """By prefix, the architectures that have it, and how their names begin after it and end."""
    found: dict[str, list[tuple[str, Ends]]] = {}
    for name, entry in entries().items():
        for reading in entry.readings:
            for prefix in reading.prefixes:
                found.setdefault(prefix, []).append((name, reading.ends))
    return found


def _has_denoiser(explained: Mapping[str, Mapping[str, Resolved]]) -> bool:
    """Whether some name is one of a denoiser's, for one of these architectures."""
    return any(meaning.component == "denoiser" for found in explained.values() for meaning in found.values())


def _is_bare(explained: Mapping[str, Mapping[str, Resolved]], said: Sequence[Claim]) -> bool:
    """Whether the names are an encoder's that is a model of its own, for all that the metadata says.

    PEFT spells T5 alone as it spells the T5 of an image model.
    """
    return not _has_denoiser(explained) and not any(claim.arch in explained for claim in said)


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


def _marked(stems: Sequence[_Stem], base_model: str) -> tuple[str, int]:
    """The architecture whose markers explain most stems, and how many; none if they explain less than half.

    A stem belongs to the longest marker found in it. Architectures that share it are told apart by the base
    model's name; the first one stands for the others, as language models are the most common.
    """
    if any(stem.text.startswith(_PIPELINE) or any(part in stem.text for part in _IMAGE) for stem in stems):
        return "", 0
    marks = {
        name: [f".{marker}." for marker in entry.markers]  # between dots, so that they match whole segments
        for name, entry in entries().items()
        if entry.markers
    }
    counts: Counter[str] = Counter()
    for path, count in Counter(_numberless(stem.text) for stem in stems).items():
        lengths = {name: _longest_marker(own, path) for name, own in marks.items()}
        longest = max(lengths.values())
        counts.update({name: count for name, length in lengths.items() if length and length == longest})
    most = max(counts.values(), default=0)
    if not most or 2 * most < len(stems):
        return "", most
    tied = [name for name in marks if counts[name] == most]
    return (named(tied, base_model) or tied)[0], most


def _numberless(path: str) -> str:
    """A path with "#" for its numbers, between dots. A flattened name is one segment, which no marker is."""
    return f".{'.'.join(['#' if part.isdigit() else part for part in path.split('.')])}."


def _longest_marker(marks: Sequence[str], path: str) -> int:
    """The length, in segments, of the longest marker in a path."""
    return max((mark.count(".") - 1 for mark in marks if mark in path), default=0)


def _by_identity(
    name: str,
    stems: Mapping[str, object],
    coverage: float,
    said: Sequence[Claim],
    notes: tuple[str, ...] = (),
) -> Detection:
    notes += tuple(
        f"{claim.source} says {claim.value} ({claim.arch}), but the names are not those of {claim.arch}"
        for claim in said
        if claim.arch != name
    )
    return Detection(name, (), coverage, notes, CATALOG[name].resolve_all(stems))


def _by_table(
    explained: Mapping[str, Mapping[str, Resolved]],
    stems: Mapping[str, tuple[int, int] | None],
    said: Sequence[Claim],
) -> Detection:
    """Choose among the architectures that explain the names equally well."""
    contenders = {name: CATALOG[name] for name in explained}
    left, told_by, denied = told_apart(contenders, explained, stems)
    if not left:
        unlike = tuple(
            f"the names are like those of {name}, but {stem} cannot be one of its weights"
            for name, stem in denied.items()
        )
        return _by_identity(UNKNOWN, stems, 0.0, said, unlike)
    if len(left) > 1:
        claim = next((claim for claim in said if claim.arch in left), None)
        if claim is not None:
            left, told_by = [claim.arch], claim.source
    candidates = tuple(left) if len(left) > 1 else ()
    name = _origin([contenders[each] for each in left])
    alike = f"the names fit {' and '.join(left)} alike, and neither shapes nor metadata tell them apart"
    coverage = len(explained[left[0]]) / len(stems)
    if not name:
        return Detection(UNKNOWN, candidates, coverage, (alike,), CATALOG[UNKNOWN].resolve_all(stems))
    notes = [f"{alike}: read as {name}, which the others are derived from; --arch says otherwise"]
    notes = (notes if candidates else []) + _unexplained(name, stems, explained[name])
    notes += [
        f"{claim.source} says {claim.value} ({claim.arch}), but by {told_by} it is {name}"
        for claim in said
        if claim.arch != name
    ]
    return Detection(name, candidates, coverage, tuple(notes), contenders[name].settled(explained[name]))


def _origin(archs: Sequence[Arch]) -> str:
    """The one of these architectures that all others are derived from; empty if there is none."""
    origins = [arch.name for arch in archs if arch.derived_from not in {each.name for each in archs}]
    return origins[0] if len(origins) == 1 else ""


def _unexplained(name: str, stems: Mapping[str, object], explained: Mapping[str, object]) -> list[str]:
    """A note on the names that the architecture found does not have."""
    rest = [stem for stem in stems if stem not in explained]
    if not rest:
        return []
    return [f"{len(rest)} of {len(stems)} names are not those of {name} (first: {rest[0]})"]
